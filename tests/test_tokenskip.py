"""TokenSkip: formats, filters, rows that resume, the evaluation, and the LoRA script on a tiny random Llama."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.prompt_tools import token_classifier, tokenizer
from vlprune.errors import OptionError, UnknownNameError
from vlprune.prompts import TokenScores
from vlprune.prompts.ratio import last_box, same_answer
from vlprune.prompts.tokenskip import (
    RATIOS,
    add_ratio_suffix,
    answer_line,
    build_rows,
    chat_prompt,
    compressor,
    draw_ratios,
    evaluate_rows,
    hf_generate,
    split_answer,
    token_limit,
    user_text,
)
from vlprune.prompts.words import split_words

ROOT = Path(__file__).resolve().parents[1]


def words(text: str) -> int:
    return len(text.split())


def shorten(text: str, keep: float) -> str:
    kept = text.split()
    return " ".join(kept[: max(1, round(keep * len(kept)))])


def samples(number: int = 12) -> list[dict[str, Any]]:
    def sample(n: int) -> dict[str, Any]:
        cot = f"Step 1 : take {n} . Step 2 : add {n} to it and get {2 * n} ."
        return {"id": f"q{n}", "question": f"What is {n} plus {n}?", "cot": cot, "answer": str(2 * n), "correct": True}

    return [sample(n) for n in range(number)]


def test_the_suffix() -> None:
    assert add_ratio_suffix("How many?", 0.5) == "How many?<|eot_id|>0.5<|eot_id|>"
    assert add_ratio_suffix("How many?", 1.0) == "How many?"
    assert add_ratio_suffix("How many?", 0.7, "</s>") == "How many?</s>0.7</s>"
    for ratio in (0, 1.1, True, "0.5"):
        with pytest.raises(OptionError, match="ratio="):
            add_ratio_suffix("How many?", ratio)


def test_the_formats() -> None:
    ask = "Please reason step by step, and put your final answer within \\boxed{}.\nHow many?"
    assert user_text("How many?", 0.5) == f"{ask}<|eot_id|>0.5<|eot_id|>"
    llama = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert chat_prompt("How many?", 1.0, "llama3") == llama.format(ask)
    assert chat_prompt("How many?", 0.5, "llama3") == llama.format(f"{ask}<|eot_id|>0.5<|eot_id|>"), "two of them at the end"
    assert chat_prompt("How many?", 0.5, "llama3", released=True) == llama.format(f"{ask}\n<|eot_id|>0.5<|eot_id|>")
    qwen = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert chat_prompt("How many?", 0.6, "qwen") == qwen.format(f"{ask}<|eot_id|>0.6<|eot_id|>") == chat_prompt("How many?", 0.6, "qwen", released=True)
    with pytest.raises(UnknownNameError, match="Did you mean 'qwen'"):
        chat_prompt("How many?", 0.5, "qwen2")


def test_answers() -> None:
    assert answer_line("42") == "The final answer is: $\\boxed{42}$"
    assert split_answer("one two\n\nThe final answer is: $\\boxed{4}$") == ("one two", "4")
    assert split_answer("so \\boxed{1} then \\boxed{\\frac{1}{2}}") == ("so \\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}")
    assert split_answer("cut off in the mid") == ("cut off in the mid", None)
    assert split_answer("x The final answer is: 7.") == ("x", "7")
    assert last_box("\\boxed{open") is None
    assert all(same_answer(given, wanted) for given, wanted in (("1,200", "1200"), ("$5", "5.0"), ("x + 1", "x+1"), ("50\\%", "50")))
    assert not any(same_answer(given, wanted) for given, wanted in (("12", "13"), (None, "1"), ("1,2", "12"), ("(1,2)", "(1,3)")))


def test_draws() -> None:
    many = draw_ratios(6000)
    assert many == draw_ratios(6000)
    assert many != draw_ratios(6000, seed=1)
    for ratio in RATIOS:
        assert many.count(ratio) / 6000 == pytest.approx(1 / 6, abs=0.02)
    with pytest.raises(OptionError, match="ratios is empty"):
        draw_ratios(3, ())


def test_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    made = build_rows(samples(), shorten, tokenizer=words, out=out, progress=False)
    assert len(made.rows) == 12
    assert made.left_out == {}
    assert sorted(row["id"] for row in made.rows) == sorted(f"q{n}" for n in range(12))
    assert [row["id"] for row in made.rows] != [f"q{n}" for n in range(12)], "shuffled"
    ratios = dict(zip((f"q{n}" for n in range(12)), draw_ratios(12), strict=True))
    for row in made.rows:
        number = int(row["id"][1:])
        whole = samples()[number]["cot"]
        assert row["ratio"] == ratios[row["id"]]
        assert row["user"] == user_text(f"What is {number} plus {number}?", row["ratio"])
        cot = whole if row["ratio"] == 1 else shorten(whole, row["ratio"])
        assert row["response"] == f"{cot}\n\n{answer_line(str(2 * number))}"
        assert (row["cot_tokens"], row["kept_tokens"]) == (words(whole), words(cot))
        assert row["reached"] == words(cot) / words(whole)
    assert "12 rows; left out: none" in made.report()
    from datasets import load_dataset

    read = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.to_list() == made.rows
    assert build_rows(samples(), shorten, tokenizer=words, progress=False).rows == made.rows, "without a file the same"


def test_filters() -> None:
    given = samples(5)
    given[0]["correct"] = False
    given[1]["cot"] = "word " * 501
    given[2]["cot"] = "The final answer is: $\\boxed{4}$"
    given[3] = {"question": "?", "cot": "some thought \\boxed{7}\n\nThe final answer is: $\\boxed{7}$", "answer": "6"}
    made = build_rows(given, shorten, tokenizer=words, progress=False)
    assert made.left_out == {"wrong": 2, "above 500 tokens": 1, "empty": 1}
    assert [row["id"] for row in made.rows] == ["q4"]
    given[3]["answer"] = "7.0"
    assert len(build_rows(given, shorten, tokenizer=words, progress=False).rows) == 2
    with pytest.raises(OptionError, match="sample 0 has no cot, answer; it has question"):
        build_rows([{"question": "?"}], shorten, tokenizer=words, progress=False)
    with pytest.raises(OptionError, match="add 'correct'"):
        build_rows([{"question": "?", "cot": "a b", "answer": "1"}], shorten, tokenizer=words, progress=False)


def test_rows_resume(tmp_path: Path) -> None:
    """Stopped in the middle, and in the middle of a line: the file comes out the same, and no chain is compressed twice."""
    whole = tmp_path / "whole.jsonl"
    build_rows(samples(), shorten, tokenizer=words, out=whole, progress=False)
    wanted = whole.read_bytes()
    calls: list[str] = []

    def counted(text: str, keep: float) -> str:
        calls.append(text)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return shorten(text, keep)

    out = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        build_rows(samples(), counted, tokenizer=words, out=out, progress=False)
    done = out.read_bytes()
    assert wanted.startswith(done)
    assert 4 <= done.count(b"\n") < 12
    out.write_bytes(done + b'{"id": "q')
    made = build_rows(samples(), counted, tokenizer=words, out=out, progress=False)
    assert out.read_bytes() == wanted
    assert len(made.rows) == 12
    assert len(calls) - 1 == sum(ratio < 1 for ratio in draw_ratios(12)), "the interrupted one is done again, no other"
    with pytest.raises(OptionError, match="made with other seed"):
        build_rows(samples(), shorten, tokenizer=words, out=out, seed=1, progress=False)
    with pytest.raises(OptionError, match="made with other samples"):
        build_rows(samples(11), shorten, tokenizer=words, out=out, progress=False)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("{}\n")
    with pytest.raises(OptionError, match="was not written here"):
        build_rows(samples(), shorten, tokenizer=words, out=foreign, progress=False)
    assert foreign.read_text() == "{}\n"


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    """SIGKILL from within, in a process of its own."""
    out = tmp_path / "rows.jsonl"
    (tmp_path / "samples.json").write_text(json.dumps(samples()))
    program = (
        "import json, os, signal, sys\nfrom pathlib import Path\nfrom vlprune.prompts.tokenskip import build_rows\n"
        "n = []\n"
        "def cut(text, keep):\n"
        "    n.append(0)\n"
        "    if len(n) == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    kept = text.split()\n"
        "    return ' '.join(kept[: max(1, round(keep * len(kept)))])\n"
        "build_rows(json.loads(Path(sys.argv[2]).read_text()), cut, tokenizer=lambda text: len(text.split()), out=sys.argv[1], progress=False)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(out), str(tmp_path / "samples.json")], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    there = out.read_bytes().count(b"\n")
    assert 5 <= there < 12
    build_rows(samples(), shorten, tokenizer=words, out=out, progress=False)
    build_rows(samples(), shorten, tokenizer=words, out=tmp_path / "whole.jsonl", progress=False)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_published_compressors() -> None:
    text = "Step 1: count the 12 apples. Step 2: Step 2: halve them"

    def score(part: str) -> TokenScores:
        cut = split_words(part, "punctuation")
        return TokenScores([(word.start, word.end) for word in cut], [min(len(word.text), 9) / 10 for word in cut])

    llama = str(compressor(score, family="llama3")(text, 0.2))
    assert llama.startswith("Step 1:")
    assert "12" in llama
    assert str(compressor(score, family="qwen")(text, 0.2)) == "count apples halve"
    assert str(compressor(score, family="llama3", force_tokens=())(text, 0.2)) == "1 12 2 2", "an option given goes before the family's"
    with pytest.raises(OptionError, match="settings are known for llama3, qwen"):
        compressor(score, family="gemma")
    tokens = tokenizer()
    made = build_rows(samples(3), compressor(token_classifier(tokens), tokens), (0.5,), tokenizer=tokens, progress=False)
    for row in made.rows:
        cot = row["response"].split("\n\n")[0]
        assert {"1", "2"} <= set(cot.split()), "numbers stay"
        assert row["reached"] < 1


def obedient(prompts: Sequence[str], limit: int) -> list[str]:
    """A model that obeys, and is wrong at 0.5."""
    out = []
    for prompt in prompts:
        question, *rest = prompt.split("<|eot_id|>")
        ratio = float(rest[0]) if rest and rest[0][:1].isdigit() else 1.0
        number = int(question.split("What is ")[1].split()[0])
        cot = " ".join(["so"] * min(limit, round(20 * ratio)))
        out.append(f"{cot}\n\n{answer_line(str(2 * number + (ratio == 0.5)))}")
    return out


def test_the_evaluation(tmp_path: Path) -> None:
    found = evaluate_rows(samples(5), obedient, (0.5, 0.8), tokenizer=words, batch=2, out=tmp_path / "answers.jsonl", progress=True)
    table = found.summary()
    assert [row["ratio"] for row in table] == [1.0, 0.8, 0.5], "1 is always there"
    assert [row["accuracy"] for row in table] == [1, 1, 0]
    assert [row["tokens"] for row in table] == [20, 16, 10]
    assert [row["reached"] for row in table] == [1, 0.8, 0.5]
    assert all(row["seconds"] >= 0 and row["n"] == 5 for row in table)
    assert "| 0.8 | 0.800 | 100.0 ± 0.0 | 16.0 |" in found.markdown()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 15
    cut = evaluate_rows(samples(2), obedient, (0.5,), tokenizer=words, max_new_tokens=lambda ratio: int(12 * ratio), progress=False)
    assert [row["tokens"] for row in cut.summary()] == [12, 6]


def test_the_evaluation_resumes(tmp_path: Path) -> None:
    out, asked = tmp_path / "answers.jsonl", list[str]()

    def stopped(prompts: Sequence[str], limit: int) -> list[str]:
        if len(asked) > 5:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return obedient(prompts, limit)

    with pytest.raises(KeyboardInterrupt):
        evaluate_rows(samples(5), stopped, (0.5,), tokenizer=words, batch=2, out=out, progress=False)
    before = out.read_text().splitlines()
    assert len(before) == len(asked) == 7
    again: list[str] = []

    def noted(prompts: Sequence[str], limit: int) -> list[str]:
        again.extend(prompts)
        return obedient(prompts, limit)

    found = evaluate_rows(samples(5), noted, (0.5,), tokenizer=words, batch=3, out=out, progress=False)
    assert len(again) == 3
    assert [json.loads(line) for line in before] == found.rows[:7]
    assert [row["accuracy"] for row in found.summary()] == [1, 0]
    with pytest.raises(OptionError, match="made with other model"):
        evaluate_rows(samples(5), obedient, (0.5,), tokenizer=words, out=out, model="another", progress=False)
    with pytest.raises(OptionError, match="gave 1 responses to 2 prompts"):
        evaluate_rows(samples(2), lambda prompts, limit: ["x"], (0.5,), tokenizer=words, progress=False)


def test_limits() -> None:
    assert (token_limit("gsm8k", 0.5), token_limit("math", 0.5), token_limit("math", 0.5, tuned=False), token_limit("math")) == (512, 512, 1024, 1024)
    with pytest.raises(OptionError, match="'gsm8k' or 'math'"):
        token_limit("aime")


def all_texts(data: Sequence[dict[str, Any]]) -> list[str]:
    """Everything that a model is asked and answers."""
    asked = [user_text(sample["question"], ratio) for sample in data for ratio in RATIOS]
    return asked + [f"{sample['cot']}\n\n{answer_line(sample['answer'])}" for sample in data]


def a_model(folder: Path, texts: Sequence[str], width: int = 32, layers: int = 2) -> Path:
    """A tiny random Llama with a vocabulary of the words in ``texts``, saved."""
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(mark, "isolated") for mark in ("\n\n", "<|eot_id|>")] + [pre_tokenizers.WhitespaceSplit()])
    vocabulary = ["<unk>", "<pad>", "</s>", *sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text)})]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = cut
    tokens = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        eos_token_id=2, pad_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tokenskip_lora", ROOT / "examples" / "tokenskip_lora.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_the_response_is_learnt(tmp_path: Path) -> None:
    row = build_rows(samples(1), shorten, (0.5,), tokenizer=words, progress=False).rows[0]
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(a_model(tmp_path, [row["user"], row["response"]]))
    got = script().encode(row, tokens, "plain", 2048)
    learnt = [number for number, label in zip(got["input_ids"], got["labels"], strict=True) if label != -100]
    assert learnt == tokens(row["response"] + "</s>")["input_ids"]
    assert learnt[-1] == tokens.eos_token_id
    assert 0 not in got["input_ids"], "every word is known"
    assert [label for label in got["labels"] if label != -100] == learnt
    short = script().encode(row, tokens, "plain", 5)
    assert len(short["input_ids"]) == len(short["labels"]) == 5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft still asks for it
def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, two steps of tuning, the evaluation of what came out, each by its command line; then a second run of each goes on where it was."""
    data = samples(10)
    asked = tmp_path / "samples.jsonl"
    asked.write_text("".join(json.dumps(sample) + "\n" for sample in data))
    texts = all_texts(data)
    model = str(a_model(tmp_path / "model", texts))
    tokens = tokenizer()
    token_classifier(tokens).save_pretrained(tmp_path / "compressor")
    tokens.save_pretrained(tmp_path / "compressor")
    run, rows, out = script().main, tmp_path / "rows.jsonl", tmp_path / "tuned"

    run(["rows", "--model", model, "--family", "plain", "--samples", str(asked), "--compressor", str(tmp_path / "compressor"), "--rows", str(rows)])
    assert "10 rows; left out: none" in capsys.readouterr().out

    tune = ["train", "--model", model, "--family", "plain", "--rows", str(rows), "--out", str(out), "--no-bf16"]
    tune += ["--save-steps", "1", "--batch", "2", "--accumulate", "1"]
    before = {name: value.clone() for name, value in LlamaForCausalLM.from_pretrained(model).state_dict().items()}
    run([*tune, "--max-steps", "1"])
    run([*tune, "--max-steps", "2"])
    log = json.loads((out / "tokenskip.json").read_text())
    assert log["curve"][-1]["step"] == 2
    assert log["went_on_from"] == "checkpoint-1"
    assert log["rows"] == 9
    assert 0 < log["held_out"]["eval_loss"] < 20
    assert (out / "adapter_model.safetensors").exists()
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 16)
    tuned_layers = [name.rsplit(".", 1)[-1] for name in settings["target_modules"]]
    assert set(tuned_layers) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(tuned_layers) in (7, 14), "all linear layers of both blocks, not the head"
    after = LlamaForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "the model itself is as it was"

    answers = tmp_path / "answers.jsonl"
    ask = ["evaluate", "--model", model, "--family", "plain", "--adapter", str(out), "--samples", str(asked), "--answers", str(answers), "--ratios", "0.5"]
    capsys.readouterr()
    run([*ask, "--max-new-tokens", "5", "--batch", "4", "--no-bf16"])
    table = capsys.readouterr().out
    assert table.startswith("| ratio asked | reached |")
    assert len(table.splitlines()) == 4
    written = answers.read_bytes()
    assert written.count(b"\n") == 20
    run([*ask, "--max-new-tokens", "5", "--batch", "4", "--no-bf16"])
    assert capsys.readouterr().out == table
    assert answers.read_bytes() == written


def test_batches_are_padded_right(tmp_path: Path) -> None:
    """A prompt in a batch gets what it gets alone."""
    from transformers import AutoTokenizer

    texts = ["one two three four", "five", "six seven eight nine ten eleven"]
    folder = a_model(tmp_path, texts)
    tokens, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5) if weight.dim() > 1 else None
    generate = hf_generate(model, tokens)
    assert list(generate(texts, 6)) == [generate([text], 6)[0] for text in texts]
    assert len(set(generate(texts, 6))) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_tuned_model_obeys(tmp_path: Path) -> None:
    """A tiny Llama learns chains of ten words; tuned with LoRA on shortened ones it writes as many words as it is asked to."""
    chain = "first take the number and then add it once more".split()
    names = [f"n{n}" for n in range(12)]
    data = [{"question": name, "cot": " ".join([name, *chain[1:]]), "answer": name, "correct": True} for name in names for _ in range(12)]
    texts = all_texts(data)
    base = a_model(tmp_path / "random", texts, width=64)
    module = script()
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    tokens, model = AutoTokenizer.from_pretrained(base), LlamaForCausalLM.from_pretrained(base)
    whole = build_rows(data, shorten, (1.0,), tokenizer=words, progress=False).rows
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "base_run"), per_device_train_batch_size=12, max_steps=150, learning_rate=3e-3, report_to=[], remove_unused_columns=False,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=[module.encode(row, tokens, "plain", 99) for row in whole], data_collator=module.collate).train()
    model.save_pretrained(tmp_path / "base")
    tokens.save_pretrained(tmp_path / "base")
    build_rows(data, shorten, tokenizer=words, out=tmp_path / "rows.jsonl", progress=False)
    module.main([
        "train", "--model", str(tmp_path / "base"), "--family", "plain", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "tuned"), "--no-bf16",
        "--lr", "5e-3", "--batch", "12", "--accumulate", "1", "--max-steps", "400", "--r", "16", "--alpha", "32",
    ])  # fmt: skip
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "tuned")).eval()
    asked = [{"question": name, "answer": name} for name in names]
    before = evaluate_rows(asked, hf_generate(model.eval(), tokens), RATIOS, tokenizer=words, family="plain", max_new_tokens=30, batch=12, progress=False)
    after = evaluate_rows(asked, hf_generate(tuned, tokens), RATIOS, tokenizer=words, family="plain", max_new_tokens=30, batch=12, progress=False)
    print(before.markdown(), after.markdown(), sep="\n\n")
    assert [row["reached"] for row in after.summary()] == pytest.approx(list(RATIOS), abs=0.06)
    assert min(row["accuracy"] for row in after.summary()) > 0.9
    assert max(abs(row["reached"] - row["ratio"]) for row in before.summary()) > 0.2, "which it did not before"
