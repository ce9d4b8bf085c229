"""Clicks in, pairs out; notes in, vectors out; a query in, its neighbours out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from zoo.commands._app import AsJson, DataRoot, RunFolder, app, give, root_of, where_the_data_is
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.search import Kind


@app.command()
def mine(
    clicks: Annotated[Path, typer.Argument(help="clicks.parquet or .csv: user_id, note_id, timestamp.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="How: group=session_id rank_by=cosine top=10")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the pairs go.")] = Path("pairs.parquet"),
    split: Annotated[str | None, typer.Option(help="Only clicks of this split.")] = None,
    since: Annotated[str | None, typer.Option(help="Only clicks from this date on.")] = None,
    until: Annotated[str | None, typer.Option(help="Only clicks before this date.")] = None,
    memory: Annotated[str, typer.Option(help="Spill to disk beyond this.")] = "2GB",
    sql: Annotated[bool, typer.Option("--sql", help="Instead: print the query over a table clicks, for Spark SQL.")] = False,
) -> None:
    """Pairs of notes that the same users click.

    Each pair scores s(A->B) = the sum of 1/N_u over the users who clicked both, N_u being the number of notes that user u clicked.
    """
    from zoo.config import checked
    from zoo.data._mining import Mine, mine_file
    from zoo.registry import lookup
    from zoo.source import Source

    given, faults = {}, []
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        source = Source.read(f"setting {setting!r}", value)
        given[key] = source.values
        faults += [source.report(source.faults)] if source.faults else []
        faults += [] if equals else [f"{source.name}: write key=value"]
    if faults:
        raise ZooError("\n".join(faults))
    rule = Mine(**checked(Mine, given, "mine", lookup))
    if sql:
        from zoo.data._mining_sql import mining_sql

        typer.echo(mining_sql(rule), nl=False)
        return
    give(mine_file(clicks, out, rule, split=split, since=since, until=until, memory=memory), None)


@app.command()
def embed(
    folder: RunFolder,
    notes: Annotated[
        Path | None,
        typer.Argument(help="A folder with notes.parquet or .csv, or shards, or pictures; a .txt of texts; else the run's own data."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the vectors go [embeddings.parquet; of shards: embeddings].")] = None,
    data: DataRoot = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Notes at a time.")] = 256,
    shards: Annotated[str | None, typer.Option(metavar="PATTERN", help="Shards in NOTES: items-*.tar, items-{000..127}.parquet")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of shards.")] = 1,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Of a Ray cluster, of shards; local: one of this machine.")] = None,
    index: Annotated[Path | None, typer.Option(help="Where the index of shards lies, if not beside them.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out pictures of a folder that cannot be decoded.")] = False,
) -> None:
    """Vectors of all notes, as a parquet file with note_id and vector; of shards, a file for each, and only for those without one.

    A model of pictures and texts takes a folder of pictures, or a .txt with a text in each line.
    """
    from zoo.embed import embed_notes
    from zoo.embed_shards import embed_shards, has_shards

    if shards is None and (notes is not None or not has_shards(folder)):
        if workers > 1 or ray is not None or index is not None:
            raise ZooError("--workers, --ray and --index are for shards: name them with --shards 'items-*.tar'")
        out = out or Path("embeddings.parquet")
        with where_the_data_is(f"zoo embed {folder}", data):
            where_from: dict[str, Any] = {"notes": notes, "data_root": root_of(data), "skip_broken": skip_broken}
            written = embed_notes(folder, out, **where_from, batch_size=batch_size)
    else:
        if skip_broken:
            raise ZooError("--skip-broken is for a folder of pictures: of shards, broken ones count as missing")
        out = out or Path("embeddings")
        runner = None
        if ray is not None:
            from zoo.embed_ray import on_ray

            runner = on_ray(ray)
        where: dict[str, Any] = {"folder": notes, "items": shards, "data_root": root_of(data), "index": index}
        written = embed_shards(folder, out, **where, workers=workers, batch_size=batch_size, runner=runner)
    typer.echo(f"{written} vectors in {out}")


@app.command()
def search(
    folder: RunFolder,
    embeddings: Annotated[Path, typer.Argument(help="What zoo embed wrote: a file, or a folder of them.")],
    title: Annotated[str | None, typer.Option(help="Of the query.")] = None,
    topic: Annotated[str | None, typer.Option(help="Of the query.")] = None,
    content: Annotated[str | None, typer.Option(help="Of the query.")] = None,
    image: Annotated[Path | None, typer.Option(help="An image file.")] = None,
    text: Annotated[str | None, typer.Option(help="Of a model of pictures and texts: what is sought in words.")] = None,
    note: Annotated[str | None, typer.Option(help="Instead: the note_id of a note that is in the file.")] = None,
    k: Annotated[int, typer.Option("--k", "--top", min=1, help="How many.")] = 10,
    rerank: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Read the K nearest together with the query, by albef or blip.")
    ] = None,
    index: Annotated[str, typer.Option(help="exact; or of the extra faiss: flat, hnsw, ivf, or faiss, by size.")] = "exact",
    check_recall: Annotated[bool, typer.Option("--check-recall", help="Say what share of the exact neighbours the index finds.")] = False,
    as_json: AsJson = False,
) -> None:
    """The notes, pictures or texts nearest to a new one, or to one of them."""
    from zoo.embed import search_notes
    from zoo.search import index_file

    given = {"title": title, "topic": topic, "content": content, "image": image, "text": text}
    query = {key: value for key, value in given.items() if value is not None}
    found = search_notes(folder, embeddings, query, note=note, k=k, kind=cast("Kind", index), rerank=rerank)
    if check_recall:
        made = index_file(embeddings, cast("Kind", index))
        typer.echo(f"recall@{k} of {made.kind} against exact: {made.recall(k=k):.4f}", err=True)
    typer.echo(json.dumps(found, default=str) if as_json else "\n".join(f"{hit['score']:.4f}  {hit['note_id']}" for hit in found))
