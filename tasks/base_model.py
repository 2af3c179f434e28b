"""Stage base_model: the pre-trained language model as one plain folder, whatever it came from.

Writes `model/` (config, fp16 weights, tokenizer with a padding token that is not its end token) and `card.json`.
Equal parameters give equal bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.core.files import write_json
from tasks.core.models import prepare_process
from tasks.core.sections.base_model import BaseModelParams
from tasks.data.model_folder import save_model, set_padding
from tasks.data.model_readers import READERS

__all__ = ["base_model"]


def base_model(params: BaseModelParams, seed: int, *, out: Path) -> None:
    """Fetch, convert or build the model and its tokenizer.

    Args:
        params: which model.
        seed: decides the weights of kind `random`; of no effect otherwise.
        out: receives `model/` and `card.json`.

    Raises:
        ModelError: the model or its tokenizer is incomplete, or there is no usable padding token.
        SourceError: it could not be fetched, or its checksum differs.
    """
    prepare_process()
    model, tokenizer, origin = READERS[params.kind](params, seed)
    set_padding(model, tokenizer, params.pad_token)
    tokenizer.padding_side = "right"
    save_model(model.half(), tokenizer, out / "model")
    parameters = sum(weight.numel() for weight in model.parameters())
    counts = {"parameters": parameters, "vocabulary": len(tokenizer), "layers": model.config.num_hidden_layers}
    facts = {"licence": params.licence, "tokens": _tokens(tokenizer)}
    write_json(out / "card.json", {"kind": params.kind, **origin, **facts, **counts})


def _tokens(tokenizer: Any) -> dict[str, str]:
    return {"end": str(tokenizer.eos_token), "padding": str(tokenizer.pad_token)}


if __name__ == "__main__":
    from tasks.runtime.stage_runner import run_stage

    run_stage("base_model")
