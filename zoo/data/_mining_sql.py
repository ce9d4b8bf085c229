"""The miner as one SQL query that Spark and DuckDB both run, for logs that outgrow one machine."""

from __future__ import annotations

from zoo.data._mining import DAY, UNIT, Mine
from zoo.errors import ZooError

_QUERY = """\
with counted as (
  select * from clicks
  where {group} is not null and note_id is not null and timestamp is not null
),
visit as (  -- once for every note of a group
  select {group} as g, note_id as n, min(timestamp) as began, max(timestamp) as ended
  from counted{window}
  group by {group}, note_id
),
sized as (select g, cast(round({unit} / count(*)) as bigint) as weight from visit group by g),
held as (select n, count(*) as in_groups from visit group by n),
event as (select v.g, v.n, v.began, v.ended, s.weight from visit v join sized s on v.g = s.g),
pair as (  -- whole numbers, so that no order of summing changes a score
  select a.n as note_a, b.n as note_b, sum(a.weight) / {unit} as score, count(*) as n_groups
  from event a join event b on a.g = b.g and a.n <> b.n{directed}
  group by a.n, b.n
),
scored as (
  select p.note_a, p.note_b, p.score, p.n_groups / sqrt(cast(x.in_groups as double) * y.in_groups) as cosine, p.n_groups
  from pair p join held x on x.n = p.note_a join held y on y.n = p.note_b
  where p.score >= {low} and p.score <= {up} and p.n_groups >= {min_groups}
),
placed as (
  select scored.*, row_number() over (partition by note_a order by {rank_by} desc, note_b) - 1 as rank
  from scored
)
select note_a, note_b, score, cosine, n_groups, rank from placed where rank < {top} order by note_a, rank
"""


def mining_sql(rule: Mine) -> str:
    """What `zoo.data._mining.mine` does to a table ``clicks``, whose ``timestamp`` is a number of seconds, as one query.

    Args:
        rule: What counts as a pair; ``max_notes`` must be None.

    Raises:
        ZooError: If ``max_notes`` is given: another engine cannot draw the same notes.
    """
    if rule.max_notes is not None:
        raise ZooError("max_notes: which notes are drawn of a group is a matter of this program, not of SQL: leave max_notes out")
    if not rule.group.isidentifier():
        raise ZooError(f"group: {rule.group!r} is quoted differently by Spark and by others: rename the column to letters and digits")
    days = rule.window_days
    return _QUERY.format(
        group=rule.group,
        unit=f"{float(UNIT):.0e}".replace("+", ""),
        window="" if days is None else f"\n  where timestamp >= (select max(timestamp) from counted) - {days * DAY!r}",
        directed=" and a.began < b.ended" if rule.directed else "",
        low=repr(rule.low),
        up=repr(rule.up),
        min_groups=rule.min_groups,
        rank_by=rule.rank_by,
        top=rule.top,
    )
