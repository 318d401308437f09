"""The edge: who is weighed how, Eq. 21 by hand, what ships, and headers that keep to the limit."""

import itertools
from typing import Any

import pytest
import torch

from fleetfit.cloud.elastic import class_shares
from fleetfit.config.job import Job, make_job
from fleetfit.config.sections import HeaderConfig
from fleetfit.core.encoding import put, take
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import HeaderSpec, ValidationScores
from fleetfit.data.augmentation import Augmentation
from fleetfit.data.partition import Split
from fleetfit.data.samples import Inputs, Samples
from fleetfit.edge import header as edge
from fleetfit.edge.header import HeaderResult
from fleetfit.edge.header_search import METHODS
from fleetfit.edge.messages import BackboneAssignment
from fleetfit.method.size import safetensors_size_bytes
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import build_header, header_from_state
from fleetfit.models.pruning import extract, prunable_layers

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "initializer_range": 0.3,
}
LABELS = ("a", "b", "c")
SIMILARITIES = ("alone", "average", "js", "wasserstein", "calibrated")
NOTHING = ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)


# -- header search ----------------------------------------------------------------------------------------------------


def make_split() -> Split:
    def samples(num: int, name: str) -> Samples:
        generator = named_generator(0, "edge", name)
        return Samples(Inputs.of(torch.randn(num, 1, 8, 8, generator=generator)), torch.arange(num) % 3, LABELS, 64)

    return Split(samples(24, "train"), samples(6, "validation"), samples(0, "test"))


def make_assignment() -> BackboneAssignment:
    with seeded_init(0, "assignment"):
        backbone = Backbone("vit", CONFIG)
        header = build_header(HeaderSpec(), backbone.feature_shape, len(LABELS))
    return BackboneAssignment(
        cluster="phones",
        family="vit",
        config=backbone.config,
        labels=LABELS,
        header=HeaderSpec(),
        tensors=put("backbone", dict(backbone.model.state_dict())) | put("header", dict(header.state_dict())),
    )


def make_tiny_job(**header: Any) -> Job:
    return make_job({"seed": 3, "header": {"budget_steps": 24, "views": 1, "channels": 8} | header})


def find(job: Job, limit: int) -> HeaderResult:
    return edge.find_header(job, make_assignment(), make_split(), limit, lambda done, total, note: None)


def model_of(found: HeaderResult) -> Classifier:
    backbone = Backbone("vit", make_assignment().config)
    backbone.model.load_state_dict(take(found.tensors, "backbone"))
    header = header_from_state(found.header, backbone.feature_shape, len(LABELS), take(found.tensors, "header"))
    return Classifier(backbone, header).eval()


def file_bytes(model: Classifier) -> int:
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    return safetensors_size_bytes(shapes, {"format": "pt"})


def least_bytes() -> int:
    """The smallest model there is: the backbone and a linear header."""
    assignment = make_assignment()
    return file_bytes(model_of(HeaderResult(header=HeaderSpec(), trials=(), tensors=assignment.tensors)))


@pytest.mark.parametrize("search", list(METHODS))
def test_every_search_ships_a_header_within_the_limit(search: str) -> None:
    job = make_tiny_job(search=search, keep_distilled=False, warm_start=False)
    found = find(job, 10**6)
    assert found.trials
    assert found.trials == tuple(sorted(found.trials, key=lambda t: t.loss))
    assert model_of(found)(make_split().train.inputs[:]).shape == (24, 3)
    free = file_bytes(model_of(found))
    assert free <= 10**6
    room = free - least_bytes()
    if search in ("halving", "random", "enas"):
        # A limit that what was found free does not fit: something smaller is found.
        assert room > 0
        assert file_bytes(model_of(find(job, least_bytes() + room * 3 // 4))) <= least_bytes() + room * 3 // 4
    elif search != "distilled":
        with pytest.raises(ValueError, match="fits"):
            find(job, least_bytes() - 200 + room // 2)


@pytest.mark.parametrize(("search", "apart"), [("halving", 500), ("random", 1000)])
def test_a_header_fits_to_the_byte_whole_and_pruned(search: str, apart: int) -> None:
    """The limit is a promise: what is found for a limit close to a header's size keeps to it, and so does any cut."""
    narrow: dict[str, Any] = {"operations": ["conv1"], "channels": 4, "max_blocks": 3, "repeats": 3, "budget_steps": 8}
    job = make_tiny_job(search=search, keep_distilled=False, warm_start=False, **narrow)
    size = file_bytes(model_of(find(job, 10**6)))
    found = 0
    for limit in range(size - 100, size + 3000, apart):
        try:
            model = model_of(find(job, limit))
        except ValueError:  # a promise that cannot be kept is not made
            continue
        found += 1
        masks = {n: torch.ones(layer.num_neurons) > 0 for n, layer in prunable_layers(model.header).items()}
        for mask in masks.values():
            mask[0] = False
        pruned = Classifier(model.backbone, extract(model.header, masks))
        assert max(file_bytes(model), file_bytes(pruned)) <= limit
    assert found


def test_no_room_for_any_header_is_an_error() -> None:
    with pytest.raises(ValueError, match="fits"):
        find(make_tiny_job(search="random", keep_distilled=False), least_bytes())


def test_the_distilled_header_is_a_candidate_when_the_job_says_so() -> None:
    names = {t.name for t in find(make_tiny_job(search="linear"), 10**6).trials}
    assert names == {"linear", "given linear"}
    assert {t.name for t in find(make_tiny_job(search="linear", keep_distilled=False), 10**6).trials} == {"linear"}
    kept = find(make_tiny_job(search="distilled"), 10**6)
    torch.testing.assert_close(dict(kept.tensors), dict(make_assignment().tensors), rtol=0, atol=0)


def test_the_backbone_is_trained_only_when_the_job_does_not_freeze_it() -> None:
    sent = take(make_assignment().tensors, "backbone")
    for freeze in (True, False):
        job = make_tiny_job(search="enas", freeze_backbone=freeze, keep_distilled=False)
        found = take(find(job, 10**6).tensors, "backbone")
        assert list(found) == list(sent)
        assert all(torch.equal(found[n], sent[n]) for n in sent) is freeze


def test_the_search_repeats_itself_and_depends_on_the_seed() -> None:
    job = make_tiny_job()
    one, two, other = find(job, 10**6), find(job, 10**6), find(job.model_copy(update={"seed": 4}), 10**6)
    assert one.model_dump_json() == two.model_dump_json()
    torch.testing.assert_close(dict(one.tensors), dict(two.tensors), rtol=0, atol=0)
    assert other.model_dump_json() != one.model_dump_json()


def test_with_views_the_images_come_first_and_labels_follow_them() -> None:
    samples = make_split().train
    more = edge.with_views(samples, 3, Augmentation(shift_pixels=1), named_generator(0, "views"))
    assert len(more) == 72
    torch.testing.assert_close(more.inputs[:24], samples.inputs[:])
    assert more.labels.tolist() == samples.labels.tolist() * 3
    assert not torch.equal(more.inputs[24:48], samples.inputs[:])


def test_of_texts_there_is_one_view() -> None:
    tokens = Samples(Inputs.of(torch.ones(3, 5, dtype=torch.long)), torch.tensor([0, 1, 2]), LABELS, 4)
    assert edge.with_views(tokens, 3, Augmentation(), named_generator(0, "views")) is tokens


# -- the coarse model -------------------------------------------------------------------------------------------------


def test_the_coarse_model_is_what_was_found_and_what_the_job_says() -> None:
    job = make_job({"seed": 3, "header": {"search": "linear"}, "refine": {"rounds": 7, "anchor": 0.25}})
    assignment = make_assignment()
    found = HeaderResult(header=HeaderSpec(), trials=(), tensors=assignment.tensors)
    message = edge.coarse_model(job, assignment, found)
    assert (message.step, message.family, message.labels, message.seed) == (1, "vit", LABELS, 3)
    assert (message.header, message.refine) == (found.header, job.refine)
    assert message.config == assignment.config
    torch.testing.assert_close(dict(message.tensors), dict(found.tensors), rtol=0, atol=0)
    assert {name.partition(".")[0] for name in message.tensors} == {"backbone", "header"}


def test_class_shares_are_the_public_datas_and_never_zero() -> None:
    assignment = make_assignment()
    found = HeaderResult(header=HeaderSpec(), trials=(), tensors=assignment.tensors)
    shares = class_shares(torch.tensor([0, 0, 0, 1]), 3)
    assert shares == pytest.approx((4 / 7, 2 / 7, 1 / 7))  # one added to each count
    told = assignment.model_copy(update={"class_shares": shares})
    assert edge.coarse_model(Job(), told, found).class_shares == shares
    assert edge.coarse_model(Job(), assignment, found).class_shares == pytest.approx((1 / 3,) * 3)


def test_a_header_of_which_nothing_can_be_dropped_is_noted() -> None:
    assignment = make_assignment()
    pooled = HeaderSpec(kind="blocks", channels=8, pooling=2)
    for share, spec, told in ((0.2, HeaderSpec(), True), (0.0, HeaderSpec(), False), (0.2, pooled, False)):
        found = HeaderResult(header=spec, trials=(), tensors={})
        note = edge.pruning_note(make_job({"refine": {"prune_share": share}}), assignment, found)
        assert (note is not None) is told
        assert not told or "the linear header has no neurons" in str(note)


def test_defaults_name_searches_that_exist() -> None:
    fields = HeaderConfig.model_fields["search"].annotation
    assert set(METHODS) == set(itertools.chain(*(getattr(a, "__args__", ()) for a in fields.__args__)))  # type: ignore[union-attr]
