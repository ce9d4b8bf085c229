"""Weights at which no sub-layer of a transformer is idle, for the tests of parity."""

import torch


def heat(module, matrices=1.5, seed=0):
    """Vectors drawn at random, matrices as large as keeps numbers in range; at first weights a tower hardly looks at its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                drawn = torch.ones(())
            elif "emb" in name or name.endswith("query"):
                drawn *= 0.5
            elif parameter.ndim > 1:
                drawn *= matrices / parameter[0].numel() ** 0.5
            else:
                drawn = 1 + 0.3 * drawn if name.endswith("weight") else 0.3 * drawn
            parameter.copy_(drawn)
    return module.eval()


def far(a, b):
    """The largest difference, in units of the largest number."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def looks(vectors):
    """Whether rows (B, D) differ as much as they are large."""
    return bool(vectors.std(0).mean() > 0.3 * vectors.abs().mean())
