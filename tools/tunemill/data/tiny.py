"""Make the tiny Llama: its tokenizer, its weights, and what it learns from docstrings unlabelled.

The demo needs a base model where no Hub is reachable. This one is a real Llama in every file,
so nothing after it knows the difference; it has read one text only, the docstrings of this
Python's standard library, without their chapters. Those held out later are among them, unlabelled.

The same configuration, Python, machine and thread count give the same bytes.
"""

from __future__ import annotations

import io
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tunemill.data import stdlib
from tunemill.data.config import FetchConfig
from tunemill.errors import BadDataError, UsageError
from tunemill.files import write_json, write_text
from tunemill.progress import Progress
from tunemill.prompting import Prompting, read_prompting
from tunemill.work import Facts, Work

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
ROLES: Final = ("<|system|>", "<|user|>", "<|assistant|>")
SMALLEST_VOCABULARY: Final = 512
"""256 bytes, the special tokens, the characters of English text, and some words."""

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the tiny model knows the roles system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

DOCUMENT_TOKENS: Final = 128  # nine docstrings in ten are shorter; the ends of long ones teach few chapters
PADDED: Final = 32  # few tensor shapes: 60 steps of any length took 2.1 GB of memory, of these 1.1 GB
WARMUP: Final = 0.05  # of all steps
WEIGHT_DECAY: Final = 0.1
BETAS: Final = (0.9, 0.98)  # a run of some hundred steps is too short for 0.999
SPACE: Final = "\u2581"  # SentencePiece's visible space


def make(work: Work[FetchConfig]) -> Facts:
    """Write the model's files into ``work.output`` and return what is worth knowing of it.

    Raises:
        UsageError: the vocabulary is too small, or larger than the docstrings give.
        ConfigurationError: this Python came without the sources of its library.
    """
    texts = stdlib.docstrings()
    write_tokenizer(work.output, [docstring.text for docstring in texts], work.config.vocab_size)
    facts = pretrain(work.output, texts, work.config, work.progress)
    return {"text": f"docstrings of {stdlib.version()}, unlabelled", "docstrings": len(texts), **facts}


def write_tokenizer(directory: Path, texts: Sequence[str], vocab_size: int) -> None:
    """Train a SentencePiece BPE tokenizer and write it for transformers and for llama.cpp.

    Raises:
        UsageError: ``vocab_size`` does not fit the texts.
    """
    model = _train_sentencepiece(texts, vocab_size)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    write_text(directory / "tokenizer.json", _fast_tokenizer(model))
    special = dict(enumerate((UNKNOWN, BOS, EOS, *ROLES)))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(n): _special_token(text) for n, text in special.items()},
            "additional_special_tokens": list(ROLES),
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": UNKNOWN,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_text(directory / "chat_template.jinja", CHAT_TEMPLATE)


def pretrain(
    directory: Path, texts: Sequence[stdlib.Docstring], config: FetchConfig, progress: Progress
) -> Facts:
    """Train a new Llama on the texts, next token by next token, and save it in ``directory``.

    Each sequence holds docstrings of one module as they are prompted later, shuffled anew in
    each epoch: to foretell a word it pays to know what the module is about, which is what the
    fine-tuning asks for.
    """
    import torch

    ids = tokenize(directory, texts)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(config.seed)
        model = _new_model(config)
        losses, steps = _train(model, ids, config, progress)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    model.save_pretrained(directory, safe_serialization=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "steps": steps,
        "losses": [round(loss, 4) for loss in losses],
        "precision": "bfloat16" if _has_bfloat16() else "float32",
        "threads": torch.get_num_threads(),
    }


def tokenize(directory: Path, texts: Sequence[stdlib.Docstring]) -> dict[str, list[list[int]]]:
    """Return each module's docstrings as token ids of a prompt, ``DOCUMENT_TOKENS`` at most."""
    from transformers import AutoTokenizer

    prompting: Prompting = read_prompting(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    prompts = [prompting.prompt([{"role": "user", "content": docstring.text}]) for docstring in texts]
    modules: dict[str, list[list[int]]] = defaultdict(list)
    for docstring, ids in zip(texts, tokenizer(prompts, add_special_tokens=False)["input_ids"], strict=True):
        modules[docstring.module].append(list(ids[:DOCUMENT_TOKENS]))
    return dict(modules)


def pack(modules: dict[str, list[list[int]]], length: int, order: random.Random) -> list[list[int]]:
    """Return sequences of at most ``length`` tokens, each of docstrings of one module."""
    sequences = []
    for documents in modules.values():
        current: list[int] = []
        for document in order.sample(documents, len(documents)):
            if current and len(current) + len(document) > length:
                sequences.append(current)
                current = []
            current = current + document[:length]
        sequences.append(current)
    return sequences


def _train_sentencepiece(texts: Sequence[str], vocab_size: int) -> bytes:
    import sentencepiece

    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(f"vocab_size {vocab_size} is too small: give at least {SMALLEST_VOCABULARY}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(map(_without_runs, texts)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 20,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=list(ROLES),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise UsageError(f"vocab_size {vocab_size} does not fit the docstrings: {reason}") from error
    return model.getvalue()


def _without_runs(text: str) -> str:
    """Shorten ``-----`` to ``--``, so that no piece is a run of one character.

    Where several merges make the same piece, llama.cpp joins the leftmost and transformers the
    highest ranked; only runs like this one let the two differ.
    """
    return re.sub(r"(.)\1{2,}", r"\1\1", text)


def _fast_tokenizer(model: bytes) -> str:
    """Return ``tokenizer.json``: the same pieces and merges as the SentencePiece model."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(n): n for n in range(pieces.get_piece_size())}
    normal = [n for n in range(len(vocabulary)) if not (pieces.is_control(n) or pieces.is_byte(n))]
    merges = _merges({pieces.id_to_piece(n): pieces.get_score(n) for n in normal if n}, vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in (UNKNOWN, BOS, EOS, *ROLES)]
    )
    return str(tokenizer.to_str(pretty=True)) + "\n"


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first, as SentencePiece merges them."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _special_token(text: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": text, "special": True, **flags}


def _new_model(config: FetchConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            # The usual 0.02 suits widths of thousands. Here it leaves embeddings so short that, once they
            # are frozen under an adapter, no output could give a rare token more than 0.2 probability.
            initializer_range=config.hidden_size**-0.5,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _train(
    model: Any, modules: dict[str, list[list[int]]], config: FetchConfig, progress: Progress
) -> tuple[list[float], int]:
    """Run all steps; return the mean loss of each epoch and the number of steps."""
    import torch

    plan = list(_epochs(modules, config))
    total = sum(map(len, plan))
    optimizer = _optimizer(model, config.pretrain_learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))
    losses = []
    with progress.task("pretrain", total, "steps") as task:
        for batches in plan:
            done = []
            for batch in batches:
                done.append(_step(model, batch, optimizer))
                schedule.step()
                task.advance(1, f"loss {done[-1]:.2f}")
            losses.append(sum(done) / max(len(done), 1))
    return losses, total


def _epochs(modules: dict[str, list[list[int]]], config: FetchConfig) -> Iterator[list[list[list[int]]]]:
    """Yield each epoch's batches, of sequences of like length; the last epoch may be a part."""
    remaining = config.pretrain_epochs
    epoch = 0
    while remaining > 0:
        order = random.Random(f"{config.seed} {epoch}")
        sequences = pack(modules, config.pretrain_max_length, order)
        sequences.sort(key=len)
        size = config.pretrain_batch_size
        batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
        order.shuffle(batches)
        yield batches[: max(1, round(len(batches) * min(remaining, 1)))]
        remaining, epoch = remaining - 1, epoch + 1


def _optimizer(model: Any, rate: float) -> Any:
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)


def _rate(step: int, total: int) -> float:
    """Share of the peak learning rate: a linear rise, then a linear fall to a twentieth."""
    warm = max(1, round(total * WARMUP))
    if step < warm:
        return (step + 1) / warm
    return max(0.05, (total - step) / max(1, total - warm))


def _step(model: Any, batch: Sequence[Sequence[int]], optimizer: Any) -> float:
    import torch

    length = -(-max(map(len, batch)) // PADDED) * PADDED
    tokens = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in batch])
    labels = torch.tensor([[*ids, *[-100] * (length - len(ids))] for ids in batch])
    with torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16()):
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = float(loss.detach())
    if value != value:
        raise BadDataError("pretraining diverged: set a smaller pretrain_learning_rate")
    return value


def _has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively: 3 to 5 times as fast as float32, else slower."""
    import torch

    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("amx_tile"))
