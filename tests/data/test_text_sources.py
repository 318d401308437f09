"""Texts from every kind of source, and the tokenizers that read them: made or trimmed from public texts only."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel

from fleetfit.config.job import Job, make_job
from fleetfit.data.partition import cut_tiers, share_out
from fleetfit.data.preprocessing import TextPreprocessing
from fleetfit.data.samples import Samples
from fleetfit.data.sources import load_samples
from fleetfit.data.text_forms import untrained_backbone
from fleetfit.data.tokenizer_files import tokenizer_files

sys.path.insert(0, str(Path(__file__).parent))
from make_data import INTENTS, text_csv, text_fields, text_rows, text_table

torch.set_num_threads(1)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def job_of(source: str | Path, cache: Path, family: str = "bert", **data: Any) -> Job:
    return make_job(text_fields(source, cache, family, **data))


def form_of(samples: Samples) -> TextPreprocessing:
    form = samples.inputs.form
    assert isinstance(form, TextPreprocessing)
    return form


def words_of(samples: Samples) -> list[str]:
    """The texts as the tokenizer reads its own numbers."""
    tokenizer = Tokenizer.from_str(form_of(samples).tokenizer)
    return [tokenizer.decode(ids).replace(" ", "").replace("?", "").lower() for ids in samples.inputs[:].tolist()]


# -- sources ----------------------------------------------------------------------------------------------------------


def tab_separated(path: Path) -> Path:
    text_table(96).to_csv(str(path / "rows.tsv"), sep="\t")
    return path / "rows.tsv"


def json_lines(path: Path) -> Path:
    text_table(96).to_json(str(path / "rows.jsonl"))
    return path / "rows.jsonl"


def json_list(path: Path) -> Path:
    rows = text_rows(96)
    (path / "rows.json").write_text(
        json.dumps([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    )
    return path / "rows.json"


def parquet(path: Path) -> Path:
    text_table(96).to_parquet(str(path / "rows.parquet"))
    return path / "rows.parquet"


def arrow(path: Path) -> Path:
    text_table(96).save_to_disk(str(path / "saved"))
    return path / "saved"


def csv(path: Path) -> Path:
    return text_csv(path / "rows.csv", 96)


@pytest.mark.parametrize("write", [csv, tab_separated, json_lines, json_list, parquet, arrow])
def test_every_kind_gives_the_same_texts(write: Callable[[Path], Path], tmp_path: Path, cache: Path) -> None:
    samples = load_samples(job_of(write(tmp_path), cache, max_tokens=18))
    rows = text_rows(96)
    assert samples.label_names == INTENTS
    assert [INTENTS[i] for i in samples.labels.tolist()] == rows["intent"]
    assert words_of(samples) == [text.replace(" ", "").replace("?", "").lower() for text in rows["text"]]
    assert samples.raw_bytes_per_sample == round(sum(map(len, rows["text"])) / 96)
    assert samples.inputs.store.dtype == torch.int32
    assert samples.inputs[:].dtype == torch.long


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_a_tokenizer_of_the_familys_kind_is_made_and_fits_the_model(family: str, tmp_path: Path, cache: Path) -> None:
    job = job_of(csv(tmp_path), cache, family)
    samples = load_samples(job)
    form = form_of(samples)
    kind = json.loads(form.tokenizer)["model"]["type"]
    assert kind == ("BPE" if family == "roberta" else "WordPiece")
    backbone = untrained_backbone(job.model, form).eval()
    assert backbone.input_shape == samples.inputs.shape == (form.num_tokens,)
    assert backbone.config["vocab_size"] == Tokenizer.from_str(form.tokenizer).get_vocab_size() <= 300
    assert backbone.config["pad_token_id"] == form.pad_id
    with torch.no_grad():
        output = backbone.run(samples.inputs[:9])
    assert output.mask is not None
    assert torch.equal(output.mask, samples.inputs[:9] != form.pad_id)
    assert 1 < int(output.mask.sum(1).min()) < int(output.mask.sum(1).max()) <= form.num_tokens
    assert load_samples(job).fingerprint == samples.fingerprint, "the tokenizer was made again, but not the same"


def test_only_public_texts_decide_on_the_tokenizer(tmp_path: Path, cache: Path) -> None:
    """What only devices write, no shipped vocabulary may know."""
    rows = text_rows(96)
    job = job_of(tmp_path / "a.csv", cache)
    private, public, test, shared = cut_tiers(range(96), job.data, job.seed)
    for i in [*private, *test, *shared]:
        rows["text"][int(i)] += " secretword" * 9
    from datasets import Dataset

    Dataset.from_dict(rows).to_csv(str(tmp_path / "a.csv"))
    form = form_of(load_samples(job))
    assert "secret" not in form.tokenizer
    text_csv(tmp_path / "b.csv", 96)
    assert form == form_of(load_samples(job_of(tmp_path / "b.csv", cache)))
    data = share_out(load_samples(job), job.data, {"c": ["c-1"]}, job.seed)
    assert len(data.public.train) + len(data.public.validation) == len(public)


def test_texts_that_are_too_long_are_cut_and_counted(tmp_path: Path, cache: Path) -> None:
    samples = load_samples(job_of(csv(tmp_path), cache, max_tokens=6))
    form = form_of(samples)
    tokenizer = Tokenizer.from_str(form.tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    long = sum(len(tokenizer.encode(text).ids) > 6 for text in text_rows(96)["text"])
    assert 0 < long < 96
    assert form.num_tokens == 6
    assert samples.summary is not None
    assert samples.summary.notes == (f"{long} texts are cut to 6 tokens",)
    assert samples.inputs.shape == (6,)


def test_the_length_is_that_of_the_public_texts_but_of_one_in_a_hundred(tmp_path: Path, cache: Path) -> None:
    from datasets import Dataset

    rows = text_rows(1000)
    public = cut_tiers(range(1000), Job().data, 0)[1].tolist()
    for i in public[:4]:  # of 400
        rows["text"][i] = "my card is gone " * 20
    Dataset.from_dict(rows).to_csv(str(tmp_path / "a.csv"))
    samples = load_samples(job_of(tmp_path / "a.csv", cache))
    assert samples.summary is not None
    assert samples.summary.notes == (f"4 texts are cut to {samples.inputs.shape[0]} tokens",)
    assert samples.inputs.shape[0] < 18
    for i in public[4:10]:
        rows["text"][i] = "my card is gone " * 20
    Dataset.from_dict(rows).to_csv(str(tmp_path / "a.csv"))
    assert load_samples(job_of(tmp_path / "a.csv", cache)).inputs.shape == (18,), "as many as the model has positions"


@pytest.mark.parametrize("empty", [" ", "\t ", None])
def test_empty_texts_are_left_out_up_to_a_share(
    empty: str | None, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import Dataset

    caplog.set_level("INFO", "fleetfit")
    rows = text_rows(96)
    for i in (3, 50):
        rows["text"][i] = empty
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "a.parquet"))
    samples = load_samples(job_of(tmp_path / "a.parquet", cache, empty_text_share=0.03))
    assert len(samples) == 94
    assert [INTENTS[i] for i in samples.labels.tolist()] == [
        n for i, n in enumerate(rows["intent"]) if i not in (3, 50)
    ]
    assert samples.summary is not None
    assert samples.summary.left_out == {"empty texts": 2}
    assert "left out 2 empty texts" in caplog.text
    with pytest.raises(
        ValueError, match=r"data\.input_column = 'text': 2 of 96 texts are empty, and data\.empty_text_"
    ):
        load_samples(job_of(tmp_path / "a.parquet", cache))


def test_numbers_are_texts_where_the_job_says_so(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "01,a\n2,b\n" * 20)
    with pytest.raises(
        ValueError, match=r"text is all numbers: naming it says that they are texts\. The data has text"
    ):
        load_samples(job_of(tmp_path / "a.csv", cache))
    assert words_of(load_samples(job_of(tmp_path / "a.csv", cache, input_column="text")))[:2] == ["01", "2"]
    from datasets import Dataset

    Dataset.from_dict({"text": [7, 8] * 20, "label": ["a", "b"] * 20}).to_parquet(str(tmp_path / "a.parquet"))
    assert words_of(load_samples(job_of(tmp_path / "a.parquet", cache, input_column="text")))[:2] == ["7", "8"]


def test_a_text_model_does_not_read_digits_nor_an_image_model_texts(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"'digits' has images, but model\.family = 'bert' reads texts"):
        load_samples(job_of("digits", cache))
    with pytest.raises(ValueError, match="no column holds images; the model reads images"):
        load_samples(make_job({"data": {"source": str(csv(tmp_path))}, "run": {"cache": str(cache)}}))


def test_more_tokens_than_positions(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.max_tokens must be <= the 18 positions of the model, got 19$"):
        load_samples(job_of(csv(tmp_path), cache, max_tokens=19))


# -- pre-trained ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretrained(tmp_path: Path, cache: Path) -> Path:
    """A small BERT with a tokenizer of its own, that has seen more than the job's texts."""
    text_csv(tmp_path / "more.csv", 96)
    others = [
        *("the", "quick", "brown", "fox", "jumps", "over"),
        *("some", "lazy", "dogs", "while", "it", "rains", "outside"),
    ]
    with (tmp_path / "more.csv").open("a") as file:
        file.writelines(f"{' '.join(others[i % 9 :])},{INTENTS[i % 4]}\n" for i in range(96))
    form = form_of(load_samples(job_of(tmp_path / "more.csv", cache)))
    folder = tmp_path / "model"
    config = BertConfig(
        vocab_size=Tokenizer.from_str(form.tokenizer).get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name, content in tokenizer_files(form).items():
        (folder / name).write_text(content)
    return folder


def pretrained_job(source: Path, cache: Path, folder: Path, **model: Any) -> Job:
    fields = text_fields(source, cache)
    return make_job({**fields, "model": {"family": "bert", "pretrained": str(folder), **model}})


@pytest.mark.parametrize("vocabulary", ["trimmed", "full"])
def test_a_pretrained_model_computes_the_same_with_its_own_tokenizer(
    vocabulary: str, pretrained: Path, tmp_path: Path, cache: Path
) -> None:
    job = pretrained_job(csv(tmp_path), cache, pretrained, vocabulary=vocabulary, frequent_tokens=5)
    samples = load_samples(job)
    backbone = untrained_backbone(job.model, samples.inputs.form).eval()
    assert backbone.input_shape == samples.inputs.shape
    model = BertModel.from_pretrained(pretrained, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    number = tokenizer.vocab_size
    assert backbone.config["vocab_size"] == number if vocabulary == "full" else backbone.config["vocab_size"] < number
    public = cut_tiers(samples, job.data, job.seed)[1][:20].tolist()
    texts = [text_rows(96)["text"][i] for i in public]
    theirs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=samples.inputs.shape[0])
    with torch.no_grad():
        expected = model(**theirs).last_hidden_state
        found = backbone.run(samples.inputs[torch.tensor(public)]).output
    there = theirs["attention_mask"].bool()
    assert torch.allclose(found[:, : there.shape[1]][there], expected[there], atol=1e-5)


def test_autotokenizer_reads_the_files_and_makes_the_same_inputs(tmp_path: Path, cache: Path) -> None:
    for family in ("bert", "roberta"):
        samples = load_samples(job_of(csv(tmp_path), cache, family))
        form = form_of(samples)
        for name, content in tokenizer_files(form).items():
            (tmp_path / name).write_text(content)
        texts = [
            *text_rows(96)["text"],
            "something else entirely, far longer than any of the texts that were public: zzz",
        ]
        theirs = AutoTokenizer.from_pretrained(tmp_path)(texts, padding="max_length", truncation=True)["input_ids"]
        plain = [t.ids for t in Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode_batch(texts)]
        assert theirs == plain == form.apply(texts).tolist()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no tokenizer", "has no tokenizer: no tokenizer.json and no list of tokens"),
        ("another model", "is a 'distilbert', but model.family is 'bert'; set model.family = 'distilbert'"),
        ("fewer rows", r"its tokenizer has \d+ tokens more than its model"),
        ("no padding", "its tokenizer names no padding, and pad_token_id 9999 of its config.json is no token"),
    ],
)
def test_what_is_wrong_with_a_pretrained_text_model(
    damage: str, says: str, pretrained: Path, tmp_path: Path, cache: Path
) -> None:
    config = json.loads((pretrained / "config.json").read_text())
    if damage == "no tokenizer":
        (pretrained / "tokenizer.json").unlink()
        (pretrained / "tokenizer_config.json").unlink()
    elif damage == "another model":
        config["model_type"] = "distilbert"
    elif damage == "fewer rows":
        config["vocab_size"] = 20
    else:
        config["pad_token_id"] = 9999
        names = json.loads((pretrained / "tokenizer_config.json").read_text())
        (pretrained / "tokenizer_config.json").write_text(json.dumps(names | {"pad_token": None}))
        parts = json.loads((pretrained / "tokenizer.json").read_text())
        (pretrained / "tokenizer.json").write_text(json.dumps(parts | {"padding": None}))
    (pretrained / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^model\.pretrained = .*{says}"):
        load_samples(pretrained_job(csv(tmp_path), cache, pretrained, vocabulary="full"))


def test_progress_is_told_and_the_log_says_what_was_taken(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, int, int, str]] = []
    with caplog.at_level(logging.INFO, "fleetfit"):
        load_samples(job_of(csv(tmp_path), cache), lambda *step: told.append(step))  # type: ignore[arg-type]
    assert [note for *_, note in told] == [
        f"reading {tmp_path / 'rows.csv'}",
        "making the tokenizer",
        "96 of 96 texts encoded",
    ]
    assert {phase for phase, *_ in told} == {"data"}
    assert all(done < total for _, done, total, _ in told)
    assert f"taken from {tmp_path / 'rows.csv'}" in caplog.text
