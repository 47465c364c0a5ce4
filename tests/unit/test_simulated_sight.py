"""Models that see, simulated: pictures or features in a step, questions about them, how their weights begin."""

from __future__ import annotations

import dataclasses

import pytest

from jobs.models.building import build_model
from jobs.simulate.run import answered
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.plan.shapes import shapes_of
from orchestrator.spec.identity import plain
from orchestrator.spec.resolve import before_upcycling
from tests.seeing import LEARN, SEES, VISION

VOCABULARY = 64
MODEL = build_model(SEES, VOCABULARY)


def ask(kind, model=SEES, **more):
    answer = answered({"kind": kind, "model": plain(model), "vocab_size": VOCABULARY, **more})
    assert "failed" not in answer, answer["failed"]
    return answer


def trained(images, freeze=""):
    train = plain(dataclasses.replace(LEARN, freeze=""))
    return ask("training", phase="instruct", train=train, engine="torch", ranks=1, words=[freeze], images=images)


def test_every_stage_of_a_model_that_sees_is_a_shape():
    graph = build_graph(load_grid("libmoe_vlm", scale="paper", only=["preset=smoe"]))
    told = [(shape.kind, shape.question.get("images"), shape.question.get("carried")) for shape in shapes_of(graph)]
    assert ("training", "features", None) in told
    assert ("training", "pixels", None) in told
    assert ("start", None, None) in told
    assert ("start", None, "vision") in told
    assert next(shape for shape in shapes_of(graph) if shape.kind == "evaluation").question["reads"] == [
        "pictures",
        "shown",
    ]


def test_a_step_with_pictures_holds_the_encoder_s_activations_and_one_with_features_none():
    pixels, features = trained("pixels"), trained("features", "vision")
    sizes = {name: parameter.numel() for name, parameter in MODEL.named_parameters()}
    assert pixels["parameters"] == features["parameters"] == sum(sizes.values())
    held = pixels["moments"]["step"]["kinds"]
    assert held["weights"] == 4 * sum(sizes.values())
    assert held["optimizer"] == pytest.approx(8 * sum(sizes.values()), rel=1e-2)
    frozen = sum(size for name, size in sizes.items() if name.startswith("vision.encoder."))
    few = features["moments"]["step"]["kinds"]
    assert few["optimizer"] == pytest.approx(8 * (sum(sizes.values()) - frozen), rel=1e-2)
    assert few["activations"] < held["activations"]


def test_questions_about_pictures_and_the_probe_are_evaluated():
    answer = ask("evaluation", max_length=32, precision="fp32", device="cpu", reads=["pictures", "shown"])
    assert set(answer["moments"]) == {"start", "pictures", "shown"}
    assert answer["tokens"] == 64 * 32
    # The logits of 64 rows and, of them in fp32, their logarithms.
    assert answer["moments"]["pictures"]["bytes"] > 2 * 4 * 64 * 31 * VOCABULARY


def test_a_vision_side_is_made_whole_in_host_memory():
    dense = before_upcycling(SEES)
    sides = {name: build_model(spec, VOCABULARY).vision for name, spec in (("dense", dense), ("experts", SEES))}
    size = {name: 0 if side is None else sum(p.nbytes for p in side.parameters()) for name, side in sides.items()}
    # Experts are copies beside the dense side that a state has, which is read as it is needed.
    assert ask("start", carried="vision")["host"] >= size["experts"]
    # The first encoder is read beside its own memory, and a model that sees is put together from it.
    read = dataclasses.replace(dense, vision=dataclasses.replace(VISION, checkpoint="any"))
    assert ask("start", read, carried="text")["host"] >= 2 * size["dense"]


def test_a_job_of_several_processes_makes_weights_or_trains():
    words = ["set.execution.engine=fsdp", *(f"set.execution.resources.{p}.processes=2" for p in ("align", "instruct"))]
    graph = build_graph(load_grid("quickstart_vlm", overrides=[*words, "set.pretrain=null"]))
    kinds = {key: stage.kind for key, stage in graph.stages.items()}
    ready = [key for key, kind in kinds.items() if kind == "init"]
    done = {key for key, stage in graph.stages.items() if stage.phase == "prepare"}
    for first in ready:
        (chain,) = graph.chains([first], done)
        assert [kinds[key] for key in chain] == ["init"], "rank 1 would train before rank 0 has made the weights"
