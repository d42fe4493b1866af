"""Tensors that stay on the device beside the model's: what a plan may say of them, and what it must not."""

from dataclasses import replace

import pytest
from protos.samples import PLAN
from wearfleet_protos.errors import ProtocolError, ShapeError
from wearfleet_protos.plan import Plan, UploadSpec
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

MODEL = next(t for t in PLAN.tensors if t.group == TensorGroup.PARAM)
OWN = TensorSpec(
    "personal/w", MODEL.dtype, MODEL.shape, TensorRole.AUX, TensorGroup.AUX, "local", copy_of=MODEL.name
)


def plan_with(*tensors: TensorSpec, upload: UploadSpec = PLAN.upload) -> Plan:
    return replace(PLAN, tensors=(*PLAN.tensors, *tensors), upload=upload)


def test_an_own_version_stays_is_not_downloaded_and_makes_the_model_personal() -> None:
    plan = Plan.from_bytes(plan_with(OWN).to_bytes())
    assert OWN in plan.local_specs()
    assert OWN not in plan.download_specs()
    assert OWN not in plan.upload_specs()
    assert plan.personal_names()[MODEL.name] == OWN.name
    assert PLAN.personal_names()[MODEL.name] == MODEL.name
    assert plan.personal_names().keys() == PLAN.personal_names().keys()


def test_an_anchor_is_no_own_version() -> None:
    assert "anchor/head.weight" not in PLAN.personal_names().values()


@pytest.mark.parametrize(
    "tensors",
    [
        (replace(OWN, copy_of=""),),
        (replace(OWN, copy_of="nowhere"),),
        (replace(OWN, group=TensorGroup.PARAM),),
    ],
)
def test_what_stays_has_a_start_and_is_no_part_of_the_model(tensors: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(ProtocolError):
        plan_with(*tensors)


def test_what_stays_cannot_be_uploaded() -> None:
    upload = replace(PLAN.upload, roles=(TensorRole.AUX,), groups=(TensorGroup.AUX,))
    with pytest.raises(ProtocolError, match="both uploaded and kept local"):
        plan_with(OWN, upload=upload)


@pytest.mark.parametrize("origin", ["global", "zeros"])
def test_only_copies_and_what_stays_name_a_source(origin: str) -> None:
    with pytest.raises(ShapeError, match="copy_of"):
        replace(OWN, origin=origin)
