"""What an unknown flag was probably meant to be: a misspelt one, or one that other tools of the field have."""

from __future__ import annotations

import difflib
from collections.abc import Collection

OTHER_NAMES = {
    "--block-size": "--context",
    "--cfg-scale": "--guidance",
    "--checkpointing-steps": "--save-every",
    "--checkpoints-total-limit": "--keep",
    "--dataloader-num-workers": "--num-workers",
    "--eval-interval": "--eval-every",
    "--eval-steps": "--eval-every",
    "--evaluate-every": "--eval-every",
    "--evaluate-n": "--eval-samples",
    "--gradient-accumulation-steps": "--grad-accum-steps",
    "--gradient-checkpointing": "--checkpointing",
    "--guidance-scale": "--guidance",
    "--learning-rate": "--lr",
    "--max-grad-norm": "--grad-clip",
    "--max-iters": "--end-step",
    "--max-new-tokens": "--tokens",
    "--max-steps": "--end-step",
    "--max-train-steps": "--end-step",
    "--model-name-or-path": "--model",
    "--n-embd": "--hidden",
    "--n-head": "--heads",
    "--n-layer": "--layers",
    "--num-inference-steps": "--steps",
    "--out-dir": "--name",
    "--output-dir": "--name",
    "--per-device-train-batch-size": "--batch-size",
    "--resume-from-checkpoint": "--resume",
    "--save-steps": "--save-every",
    "--save-total-limit": "--keep",
    "--train-batch-size": "--batch-size",
    "--train-data-dir": "--data",
    "--wandb-project": "--wandb",
    "--warmup-iters": "--warmup",
    "--warmup-steps": "--warmup",
}
"""Flags of k-diffusion, nanoGPT, transformers and diffusers, and what the commands here call them."""

ALIKE = 0.8
"""difflib's measure, high enough that a flag of another tool is not taken for one that means something else"""


def meant(flag: str, known: Collection[str]) -> str | None:
    """The one of the ``known`` flags that somebody meant who wrote ``flag``, or None."""
    dashed = "--" + flag.partition("=")[0].lstrip("-").replace("_", "-")
    if (name := OTHER_NAMES.get(dashed)) in known:
        return name
    return next(iter(difflib.get_close_matches(dashed, known, n=1, cutoff=ALIKE)), None)
