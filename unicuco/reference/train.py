"""Train the reference model: ``python -m unicuco.reference.train --out DIR``.

A Llama-architecture causal language model of about 7 million parameters (8 blocks, grouped-query
attention, tied embeddings) and a byte-level BPE tokenizer, both learned from the standard library's
source (`unicuco.reference.corpus`). Matrices inside blocks are trained with Muon (Jordan et al.
2024, as shipped by torch), embeddings and norms with AdamW; the learning rate warms up, stays, and
decays linearly to zero over the second half. About 100 minutes on one CPU core, minutes on a GPU.

``--start DIR`` begins from a checkpoint's weights and tokenizer with fresh optimisers, e.g. to
train longer; the card then tells of both stages. What it does not do: resume to the bit. A run that
is cut off leaves its last checkpoint (every 250 steps, not decayed), which loads like any other.
"""

from __future__ import annotations

import argparse
import lzma
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unicuco.reference.corpus import held_out_text, training_texts

CONTEXT = 512
VOCABULARY = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What decides a training run.

    ``steps`` of ``batch`` sequences of 512 tokens; ``minutes`` shortens the schedule by wall time
    (0: no limit); learning rates are those of AdamW, Muon's update being scaled to AdamW's root
    mean square.
    """

    steps: int = 2600
    batch: int = 8
    minutes: float = 0.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 60
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    start: str = ""


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer with `VOCABULARY` entries from ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Build the untrained reference model: 6.96 million parameters, float32."""
    torch.manual_seed(seed)  # the library's initialiser takes no generator
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def tokenise(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return one long ``t`` tensor of token ids, every text followed by the end-of-text token."""
    ids: list[int] = []
    for encoded in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [*encoded.ids, 0]
    return torch.tensor(ids)


def batches(stream: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield ``batch x (CONTEXT + 1)`` windows; every epoch visits the stream from a new offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - CONTEXT - 1, CONTEXT)
        order = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in order.split(batch):
            if len(chunk) == batch:
                yield torch.stack([stream[s : s + CONTEXT + 1] for s in chunk.tolist()])


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Return the share of the peak rate at ``progress`` in [0, 1].

    It warms up, holds, and decays over the second half.
    """
    return min(1.0, (progress + 1e-9) / warmup if warmup else 1.0, max(0.0, (1.0 - progress) / 0.5))


def train_steps(
    model: PreTrainedModel, stream: Tensor, options: TrainOptions
) -> Iterator[tuple[int, float, float]]:
    """Train ``model`` on a ``t`` token stream until steps or minutes are used up.

    Yields:
        After every step its number, the share of the schedule in [0, 1) and the loss.
    """
    optimizers = make_optimizers(model, options)
    started = time.monotonic()
    for step, window in enumerate(batches(stream, options.batch, options.seed)):
        minutes = (time.monotonic() - started) / 60
        progress = max(step / options.steps, minutes / options.minutes if options.minutes else 0.0)
        if progress >= 1.0:
            return
        factor = learning_rate_factor(progress, options.warmup_steps / options.steps)
        rate = options.learning_rate * factor
        yield step, progress, train_step(model, optimizers, window.to(options.device), rate)


def train(out: Path, options: TrainOptions) -> dict[str, float]:
    """Train, write model, tokenizer and card to ``out``, and return the test measurements."""
    torch.set_num_threads(options.threads)
    texts = training_texts()
    tokenizer, model = _begin(texts, options)
    stream = tokenise(tokenizer, texts)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(stream):,} training tokens",
        flush=True,
    )
    started = time.monotonic()
    done = 0
    for step, progress, loss in train_steps(model, stream, options):
        done = step + 1
        if step % 25 == 0:
            rate = done * options.batch * CONTEXT / (time.monotonic() - started)
            print(
                f"step {step} progress {progress:.3f} loss {loss:.3f} {rate:.0f} tokens/s",
                flush=True,
            )
        if done % 250 == 0:
            _save(model, tokenizer, out)
    _save(model, tokenizer, out)
    measured = evaluate(_on(options.device, LlamaForCausalLM.from_pretrained(out)), tokenizer)
    _write_card(out, options, done, len(stream), (time.monotonic() - started) / 60, measured)
    return measured


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Measure perplexity and bits per byte on the test text, and what ``xz -9`` needs for it."""
    text = held_out_text("test")
    ids = tokenise(tokenizer, [text])
    total = 0.0
    count = 0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1].to(model.device)
        logits = model(window[None, :-1]).logits[0].float()
        total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    num_bytes = len(text.encode())
    return {
        "test_tokens": float(count),
        "test_bytes": float(num_bytes),
        "test_perplexity": math.exp(total / count),
        "test_bits_per_byte": total / math.log(2) / num_bytes,
        "xz_bits_per_byte": 8 * len(lzma.compress(text.encode(), preset=9)) / num_bytes,
    }


def _on(device: str, model: LlamaForCausalLM) -> LlamaForCausalLM:
    nn.Module.to(model, device)  # transformers' own `to` is typed wrongly
    return model


def _begin(
    texts: list[str], options: TrainOptions
) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    if not options.start:
        return build_tokenizer(texts), _on(options.device, build_model(options.seed))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start)
    model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
    model.train()
    return tokenizer, _on(options.device, model)


def make_optimizers(model: nn.Module, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside blocks and AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    rate = options.learning_rate
    return [
        torch.optim.Muon(
            matrices, lr=rate, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train_step(
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    window: Tensor,
    learning_rate: float,
) -> float:
    """Learn from ``batch x (t + 1)`` tokens and return the loss; forward passes are in bfloat16."""
    with torch.autocast(window.device.type, dtype=torch.bfloat16):
        logits = model(window[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    # A copy in bf16: training goes on in float32.
    half = LlamaForCausalLM(model.config)
    nn.Module.to(half, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def _write_card(
    out: Path,
    options: TrainOptions,
    steps: int,
    stream_tokens: int,
    minutes: float,
    measured: dict[str, float],
) -> None:
    lines = [
        "# Model card: the UniCuCo reference model",
        "",
        "A small Llama-architecture causal language model (8 blocks, hidden size 256, "
        "4 query and 2 key-value",
        "heads of 64, feed-forward 704, vocabulary 4,096, tied embeddings), bfloat16.",
        "It exists so that UniCuCo's demo, tests and benchmarks run anywhere with no download; "
        "it is of no other use.",
        "",
        f"- Corpus: source of the standard library of Python {platform.python_version()}, "
        "test packages, generated",
        f"  tables and the held-out modules of `corpus.py` left out; {stream_tokens:,} tokens.",
        f"- Training: {steps:,} steps of {options.batch} x {CONTEXT} tokens "
        f"({steps * options.batch * CONTEXT / stream_tokens:.1f} epochs), {minutes:.0f} minutes,",
        f"  {options.threads} thread(s), device {options.device}, seed {options.seed}, "
        f"torch {torch.__version__}.",
        f"- Test text ({measured['test_bytes']:,.0f} bytes, {measured['test_tokens']:,.0f} tokens, "
        f"context {CONTEXT}):",
        f"  perplexity {measured['test_perplexity']:.2f}, "
        f"{measured['test_bits_per_byte']:.3f} bits per byte;",
        f"  `xz -9` needs {measured['xz_bits_per_byte']:.3f} bits per byte on the same text.",
        *_earlier_stage(options),
        "- Made by `python -m unicuco.reference.train`; options: "
        f"{asdict(replace(options, start=''))}.",
        "",
        "Weights and tokenizer were made by this project and fall under its licence; "
        "the corpus is not included.",
    ]
    (out / "MODEL_CARD.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _earlier_stage(options: TrainOptions) -> list[str]:
    """Return what the card of the checkpoint that training began from says of its training."""
    card = Path(options.start) / "MODEL_CARD.md"
    if not options.start or not card.is_file():
        return []
    lines = card.read_text(encoding="utf-8").splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("- Training: "))
    return [
        "- Begun from an earlier stage: " + lines[first].removeprefix("- Training: "),
        lines[first + 1],
    ]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the UniCuCo reference model.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights, tokenizer and model card"
    )
    for name, default in asdict(TrainOptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    values = vars(parser.parse_args(arguments))
    out = values.pop("out")
    print(train(out, TrainOptions(**values)))


if __name__ == "__main__":
    main()
