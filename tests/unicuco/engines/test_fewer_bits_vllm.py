from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unicuco.engines import Sampling, VllmEngine, VllmOptions
from unicuco.engines.folder import check_bits, read_facts
from unicuco.errors import RequestError
from unicuco.models import load_model, load_tokenizer
from unicuco.models.kv_cache import RoundedCache
from unicuco.testing.cases import make_evaluation_case
from unicuco.testing.tiny import tiny_model_folder
from unicuco.testing.variants import write_shrunk_case

pytestmark = pytest.mark.xdist_group("vllm")

DIMENSIONS = ("sparsity", "weight_bits", "kv_bits")
QUERY, OUTPUT, GATE, DOWN = (
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
KINDS: dict[str, dict[str, float]] = {
    "mixed": {
        f"weight_bits/model.layers.0.{QUERY}": 1.0,
        f"weight_bits/model.layers.0.{GATE}": 0.5,
        f"weight_bits/model.layers.0.{DOWN}": 1.0,
        f"weight_bits/model.layers.1.{QUERY}": 0.5,
        f"weight_bits/model.layers.1.{OUTPUT}": 1.0,
        "sparsity/model.layers.0.mlp.up_proj": 0.5,
        "sparsity/model.layers.1.self_attn.k_proj": 0.25,
    },
    "cache": {f"kv_bits/block.{block}": 1 / 3 for block in range(2)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fewer-bits")
    base = tiny_model_folder(  # vLLM's CPU attention knows head sizes from 32 on
        root / "base", hidden_size=128, context=128, tied=True, dtype=torch.bfloat16
    )
    case = make_evaluation_case(base, dimensions=DIMENSIONS)
    for kind, settings in KINDS.items():
        write_shrunk_case(case, settings, root / kind)
    return {kind: root / kind for kind in KINDS}


PROMPT = "def main("


@torch.no_grad()
def agreed(folder: Path, tokens: tuple[int, ...], kv_bits: int) -> tuple[int, float]:
    """How many tokens are the best by our own loader, and the worst lead of a better one.

    The engine computes in bfloat16, so a token may lose to one that is as good.
    """
    model = load_model(folder, fewer_bits=True).model
    ids = load_tokenizer(folder)(PROMPT)["input_ids"]
    cache = RoundedCache([kv_bits] * 2)
    every = torch.tensor([[*ids, *tokens]])
    logits = model(input_ids=every, past_key_values=cache, use_cache=True).logits[0].float()
    leads = [
        float(row.max() - row[token])
        for row, token in zip(logits[len(ids) - 1 :], tokens, strict=False)
    ]
    return sum(lead == 0 for lead in leads), max(leads)


@pytest.mark.slow
def test_stock_vllm_says_what_our_own_loader_says_of_every_kind(folders: dict[str, Path]) -> None:
    # The engine's fp8 has three bits of a fraction, and is coarser than the eight judged.
    for kind, kv_bits, most in (("mixed", 16, 0.1), ("cache", 8, 0.5)):
        with VllmEngine(VllmOptions(threads=1)) as engine:
            engine.load(folders[kind])
            (answer,) = engine.generate([PROMPT], Sampling(max_tokens=24))
        count, lead = agreed(folders[kind], answer.token_ids, kv_bits)
        assert count >= 0.8 * len(answer.token_ids), (kind, count)
        assert lead < most, (kind, lead)


def test_transformers_loads_what_our_own_loader_loads(folders: dict[str, Path]) -> None:
    pytest.importorskip("compressed_tensors")
    ids = torch.randint(1, 257, (2, 20), generator=torch.Generator().manual_seed(3))
    theirs = AutoModelForCausalLM.from_pretrained(folders["mixed"], dtype=torch.float32)
    ours = load_model(folders["mixed"], fewer_bits=True).model
    with torch.no_grad():
        a, b = theirs(ids).logits.log_softmax(-1), ours(ids).logits.log_softmax(-1)
    # They scale inputs by one part in 255 otherwise.
    assert float((b.exp() * (b - a)).sum(-1).mean()) < 1e-3
    mine = dict(ours.named_parameters())
    for name, weight in theirs.named_parameters():
        if name in mine:  # beside the scales that it keeps
            torch.testing.assert_close(weight.float(), mine[name], rtol=0.01, atol=1e-5)
    assert mine.keys() <= dict(theirs.named_parameters()).keys()


def test_engines_are_told_the_types_and_never_switch_fewer_bits_in_place(
    folders: dict[str, Path],
) -> None:
    mixed, cache = read_facts(folders["mixed"]), read_facts(folders["cache"])
    told = {"dtype": "bfloat16", "kv_cache_dtype": "auto", "odd_matrix": None}
    assert mixed.engine_flags(None) == told
    assert mixed.engine_flags("float16")["dtype"] == "float16"
    assert cache.engine_flags(None) == {"dtype": None, "kv_cache_dtype": "fp8", "odd_matrix": None}
    assert "arranged anew" in str(mixed.difference(mixed))
    assert "keys and values" in str(read_facts(folders["cache"].parent / "base").difference(cache))
    document = json.loads((folders["cache"] / "strategy.json").read_text())
    assert document["precision"]["kv_cache"] == {
        "judged_bits": [8, 8],
        "engine_flag": {"kv_cache_dtype": "fp8"},
    }


def test_bits_that_an_engine_cannot_run_are_refused_with_those_that_it_can(tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", hidden_size=48, num_heads=2, num_kv_heads=1)
    case = make_evaluation_case(base, dimensions=("weight_bits",))
    settings = {f"weight_bits/model.layers.0.{DOWN}": 1.0}
    write_shrunk_case(case, settings, tmp_path / "variant")
    odd = read_facts(tmp_path / "variant").odd_matrix
    assert odd == f"model.layers.0.{DOWN}"
    with pytest.raises(RequestError, match="8 and 16 bits can") as caught:
        check_bits(odd, on_cpu=True)
    assert "\n" not in str(caught.value)
    check_bits(odd, on_cpu=False)
    document = json.loads((tmp_path / "variant" / "strategy.json").read_text())
    assert document["precision"]["runs_on"]["vllm_cpu"].startswith("no: 4 bits need multiples")
    load_model(tmp_path / "variant", fewer_bits=True)  # transformers can
