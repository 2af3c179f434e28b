"""Stage base_model: fetch, convert or build the pre-trained language model.

Writes `model/` (config, fp16 weights, tokenizer with a padding token that is not its end token) and `card.json`.
Equal parameters give equal bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.core.paths import Artifacts
from tasks.core.rows import write_json
from tasks.models.encoding import context_length
from tasks.models.fetch import READERS, check_parts, save_model, set_padding
from tasks.models.loading import init_process, linear_modules

if TYPE_CHECKING:
    from tasks.config.training import BaseModelParams

__all__ = ["base_model"]


def base_model(params: BaseModelParams, seed: int, artifacts: Artifacts) -> None:
    """Fetch, convert or build the model and its tokenizer; the seed decides the weights of kind `random` alone.

    Raises:
        ModelError: the model or its tokenizer is incomplete, they do not fit, or there is no usable padding token.
        SourceError: it could not be fetched, or its checksum differs.
    """
    init_process()
    model, tokenizer, origin = READERS[params.kind](params, seed)
    set_padding(model, tokenizer, params.pad_token)
    tokenizer.padding_side = "right"
    check_parts(model.half(), tokenizer, f"base_model {params.id or params.kind}")
    save_model(model, tokenizer, artifacts.out / "model")
    parameters = sum(weight.numel() for weight in model.parameters())
    counts = {"parameters": parameters, "vocabulary": len(tokenizer), "layers": model.config.num_hidden_layers}
    tokens = {"end": str(tokenizer.eos_token), "padding": str(tokenizer.pad_token)}
    bounds = {"context": context_length(model.config), "linear_modules": linear_modules(model)}
    card = {"kind": params.kind, **origin, "licence": params.licence, "tokens": tokens, **counts, **bounds}
    write_json(artifacts.out / "card.json", card)


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("base_model")
