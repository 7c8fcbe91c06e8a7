"""Which of transformers' text models run with ``attn_implementation="natten_layers"``, found by running them.

    python benchmarks/transformers_support.py --table docs/transformers-support.md
    python benchmarks/transformers_support.py mistral modernbert

Every architecture that transformers maps to a causal or a masked language model is built tiny, with random weights, and
its logits are compared with those of its own attention, on whole texts and on texts padded on the left or the right.
Then two texts are packed into a row, and each is changed: is that seen in the logits of the other?
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from natten_layers.integrations.transformers import NAME, register
from natten_layers.io.files import replacing

from .runner import at_least, command

TOLERANCE = 1e-4  # of the largest logit, fp32
KINDS = {
    "causal LM": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    "masked LM": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
}
LENGTH = 12
TEXT = 5
"""tokens of the first of two texts in a row"""
WINDOW = 5
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "embed_dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 32,
    "ffn_dim": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "d_ff": 32,
    "n_inner": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "local_attention": 2 * WINDOW,
    "attention_chunk_size": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
}


# What to change where the sizes above do not fit together, tried in turn until the model's own attention runs.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"head_dim": None, "num_key_value_heads": 4},
    {"head_dim": 8, "qk_rope_head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
    {"head_dim": None, "num_key_value_heads": 4, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    {"head_dim": 8, "rotary_dim": 8, "layer_types": None, "num_experts_per_tok": 1},
]


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "dots1": {
        "n_routed_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": WINDOW},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 2, "moe_topk": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]},
}
"""What some architectures need besides, as their defaults are None or depend on other sizes."""


@dataclass(frozen=True)
class Row:
    model_type: str
    kind: str
    verdict: str
    reason: str = ""
    packed: str = ""


def tiny(config_class: type, changes: dict[str, Any], own: dict[str, Any]) -> Any:
    """A small configuration of the architecture: its defaults with every size that it has made small, and its own."""
    defaults = config_class()
    sizes = {name: value for name, value in {**SIZES, **changes}.items() if value is not None}
    fields = {name: value for name, value in sizes.items() if has_field(defaults, name)}
    types = getattr(defaults, "layer_types", None)
    if types and changes.get("layer_types", types) and has_field(defaults, "layer_types"):  # a layer of each kind
        fields["layer_types"] = list(dict.fromkeys(types))
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return config_class(**{**fields, **own})


def has_field(defaults: Any, name: str) -> bool:
    if name in getattr(defaults, "attribute_map", {}) or not is_field(type(defaults), name):
        return False
    try:
        return getattr(defaults, name, None) is not None
    except Exception:  # sizes that vary by layer, which some configurations do not let one ask for
        return False


def is_field(config_class: type, name: str) -> bool:
    return not isinstance(getattr(config_class, name, None), property)


def build(auto: Any, config: Any, implementation: str) -> Any:
    torch.manual_seed(0)
    return auto.from_config(copy.deepcopy(config), attn_implementation=implementation).float().eval()


def texts() -> list[dict[str, Tensor]]:
    """Whole texts, and texts with three tokens of padding on the left and on the right."""
    ids = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = torch.ones(2, LENGTH, dtype=torch.long)
    left, right = whole.clone(), whole.clone()
    left[1, :3], right[1, -3:] = 0, 0
    return [{"input_ids": ids, "attention_mask": mask} for mask in (whole, left, right)]


@torch.no_grad()
def logits(model: Any, text: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    inputs = dict(text)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = text["input_ids"][:, :7]
    else:
        inputs["use_cache"] = False  # type: ignore[assignment]
    try:
        out = model(**inputs).logits
    except TypeError:  # encoders have no such argument
        inputs.pop("use_cache", None)
        out = model(**inputs).logits
    return out if model.config.is_encoder_decoder else out[text["attention_mask"].bool()]


def difference(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


def survey(model_type: str, kind: str) -> Row:
    """The row of one architecture: equal, refused (why) or not applicable (why); never anything that is unclear."""
    auto = KINDS[kind][1]
    try:
        config_class = type(transformers.AutoConfig.for_model(model_type))
    except Exception as error:  # some are parts of others and have no defaults of their own
        return Row(model_type, kind, "not applicable", f"has no default configuration ({short(repr(error))})")
    if config_class.sub_configs:
        return Row(model_type, kind, "not applicable", "several models in one; see its text model")
    problem = ""
    for changes in VARIANTS:
        try:
            config = tiny(config_class, changes, OWN.get(model_type, {}))
            model = build(auto, config, "eager")
            expected = [logits(model, text) for text in texts()]
        except Exception as error:  # whatever a configuration that does not fit together leads to
            problem = problem or f"{type(error).__name__}: {error}"
            continue
        if not all(bool(out.isfinite().all()) for out in expected):
            problem = problem or "its logits are not finite"
            continue
        verdict, reason = compare(auto, config, expected)
        return Row(model_type, kind, verdict, reason, packed(auto, config) if verdict == "equal" else "")
    return Row(model_type, kind, "not applicable", f"does not run this small with its own attention ({short(problem)})")


def compare(auto: Any, config: Any, expected: list[Tensor]) -> tuple[str, str]:
    used = []
    register()
    attention = transformers.AttentionInterface()[NAME]

    def counted(*args: Any, **options: Any) -> Any:
        used.append(True)
        return attention(*args, **options)

    transformers.AttentionInterface.register(NAME, counted)
    try:
        model = build(auto, config, NAME)
        actual = [logits(model, text) for text in texts()]
    except ValueError as error:
        return ("refused", short(str(error))) if NAME in str(error) else ("UNCLEAR", short(repr(error)))
    except KeyError as error:
        return ("refused", "it has no AttentionInterface") if NAME in str(error) else ("UNCLEAR", short(repr(error)))
    except Exception as error:
        return "UNCLEAR", short(repr(error))
    finally:
        register()
    worst = max(difference(*pair) for pair in zip(actual, expected, strict=True))
    if not worst < TOLERANCE:
        return "WRONG", f"logits differ by {worst:.1e}"
    return ("equal", "") if used else ("not applicable", "it calls no attention through AttentionInterface")


def packed(auto: Any, config: Any) -> str:
    """What keeps two texts apart that are packed into a row with position_ids that begin anew, if anything does."""
    model = build(auto, config, NAME)
    if model.config.is_encoder_decoder:
        return ""
    ends = torch.tensor([0, TEXT, LENGTH], dtype=torch.int32)
    positions = torch.arange(LENGTH)
    inputs: dict[str, Any] = {"position_ids": torch.where(positions < TEXT, positions, positions - TEXT)[None]}
    for more, words in (
        ({}, "apart"),
        ({"use_cache": False}, "apart with `use_cache=False`"),
        ({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, "apart with `cu_seq_lens_q`"),
    ):
        try:
            found = keeps_apart(model, {**inputs, **more})
        except (TypeError, ValueError):  # it has no such argument, or the plug-in refuses the call
            continue
        if found is not None:
            return words if found else f"{words}; positions go on"
    return "see each other"


@torch.no_grad()
def keeps_apart(model: Any, inputs: dict[str, Any]) -> bool | None:
    """None if a text sees the other, else whether each has the logits that it has alone, at its positions."""
    ids = texts()[0]["input_ids"]
    torch.manual_seed(0)
    other_first, other_second = (
        torch.cat([ids[a : a + 1, :TEXT], ids[b : b + 1, TEXT:]], 1) for a, b in ((1, 0), (0, 1))
    )
    both, first, second = (model(input_ids=row, **inputs).logits for row in (ids[:1], other_second, other_first))
    if (
        difference(first[:, :TEXT], both[:, :TEXT]) > TOLERANCE
        or difference(second[:, TEXT:], both[:, TEXT:]) > TOLERANCE
    ):
        return None
    alone = [
        model(input_ids=ids[:1, text], position_ids=inputs["position_ids"][:, text]).logits
        for text in (slice(0, TEXT), slice(TEXT, LENGTH))
    ]
    return difference(both, torch.cat(alone, 1)) < TOLERANCE


def short(text: str) -> str:
    """The first words of a message, fit for a cell of a table."""
    words = re.sub(r"\s+", " ", text.replace("|", "/").replace("<", "").replace(">", "")).strip()
    words = re.sub(rf"^{NAME} does not support [^:]*: ", "", words)
    return words if len(words) <= 150 else words[:147].rsplit(" ", 1)[0] + " ..."


def table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in dict.fromkeys(r.verdict for r in rows)
    }
    lines = [
        "# transformers: the architectures that were tried",
        "",
        f"`python benchmarks/transformers_support.py --table docs/transformers-support.md` wrote this page with "
        f"transformers {transformers.__version__}: "
        + ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        + ".",
        "",
        'Each architecture is built tiny with random weights. *Equal*: with `attn_implementation="natten_layers"` its '
        f"logits are those of its own eager attention to {TOLERANCE:g} of the largest, on whole texts and on texts "
        "padded on the left and on the right. *Refused*: an error says why. *Not applicable*: nothing to compare. "
        "Models of several parts (images and text) are not built; their text models are. Caches, gradients and images "
        "whose tokens see each other (Gemma 3, PaliGemma) are tested on a few families only. "
        "Soft-capped scores (Gemma 2) are computed in PyTorch, not by the kernels.",
        "",
        "*Packed texts*: whether two texts in a row see each other. *Apart*: they do not, as `position_ids` that "
        "begin anew (0, 1, 2, 0, 1, ...) say where texts begin, in any number of rows and whatever the rest of the "
        "call is. Some architectures need another argument besides, as they hand positions to their masks only, "
        "which transformers does not tell of texts if there is a cache or an `attention_mask`. *Positions go on*: "
        "the texts do not see each other, but the model counts positions itself, and gives the second text those "
        "behind the first. Architectures in which texts *see each other* have layers besides attention, such as "
        "recurrent ones, that go on from text to text, or hand positions to nothing: give each text a row of its own "
        "there.",
        "",
        "`cu_seq_lens_q` and `cu_seq_lens_k`, as `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes "
        "them, pack the texts of one row, and layers then look at no positions. Qwen's models of images and text "
        "hand positions to their layers only if `position_ids` are `[4, batch, tokens]`, of which the first are the "
        "text's. Layers of a model that is compiled as a whole cannot look at positions: `position_ids` that begin "
        "anew are an error there, unless transformers tells the masks (`use_cache=False` and no `attention_mask`; "
        "never in gpt-oss, AFMoE, OPT, BART and the like, and encoders) or there are `cu_seq_lens_q`. Tokens that "
        "are generated after packed texts see all of them.",
        "",
        "| architecture | as | result | packed texts | reason |",
        "|---|---|---|---|---|",
    ]
    return (
        "\n".join(lines + [f"| `{r.model_type}` | {r.kind} | {r.verdict} | {r.packed} | {r.reason} |" for r in rows])
        + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="all of them if none is named")
    parser.add_argument("--table", type=Path, help="the page to write")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="processes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tasks = [
        (model_type, kind)
        for kind, (names, _) in KINDS.items()
        for model_type in sorted(names)
        if not arguments.model_types or model_type in arguments.model_types
    ]
    rows = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(survey, *zip(*tasks, strict=True)):
            rows.append(row)
            print(row.model_type, row.kind, row.verdict, row.packed, row.reason, sep="  ", flush=True)
    if arguments.table:
        with replacing(arguments.table) as temporary:
            temporary.write_text(table(rows))
    if any(row.verdict.isupper() for row in rows):
        print("error: some rows are wrong or unclear", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
