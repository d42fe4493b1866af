"""From a strategy and a model to a plan: its document and the graphs that it names."""

from dataclasses import replace

import torch
from torch import Tensor
from wearfleet_models.classifier import Classifier
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import (
    BATCH_INPUTS,
    Budget,
    InputBinding,
    InputContract,
    OutputBinding,
    Phase,
    Plan,
)
from wearfleet_protos.tensors import Digest, TensorSpec, schema_hash

from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.client_program import ClientPhase, ClientProgram
from wearfleet_cloud.federated.plan_compiler import OUTPUT_PREFIX, CompiledGraph, compile_graph
from wearfleet_cloud.federated.plan_layers import with_plan_layers
from wearfleet_cloud.federated.privacy.central import check_private
from wearfleet_cloud.federated.privacy.record import check_record

__all__ = ["DEFAULT_BUDGET", "build_plan"]

DEFAULT_BUDGET = Budget(seconds=600.0, max_bytes=64 * 1024 * 1024, min_examples=8)
"""Ten minutes, 64 MiB and eight windows a round."""


def build_plan(
    strategy: Strategy,
    model: Classifier,
    contract: InputContract,
    *,
    plan_id: str,
    seed: int = 0,
    budget: Budget = DEFAULT_BUDGET,
) -> tuple[Plan, dict[Digest, bytes]]:
    """Compile a strategy's client side for a model.

    Args:
        strategy: with its hyper-parameters.
        model: its architecture counts, its values do not: the same plan serves every round.
        contract: the windows of the model (``ModelManifest.contract``).
        plan_id: unique name.
        seed: of shuffling and random numbers.
        budget: limits that the device enforces.

    Returns:
        The plan, and the bytes of its graphs by digest. Equal arguments give equal bytes.

    Raises:
        ConfigError: model and contract do not fit, or the strategy cannot be used with this model.
    """
    _check_contract(model, contract)
    program = strategy.client(with_plan_layers(model))
    check_private(strategy, program.tensors)
    compiled: dict[int, CompiledGraph] = {}
    for phase in program.phases:
        if id(phase.step) not in compiled:
            compiled[id(phase.step)] = compile_graph(phase.step, _example(program, phase, contract))
    plan = Plan(
        plan_id=plan_id,
        strategy=strategy.info.name,
        strategy_version=strategy.info.version,
        model_schema_hash=schema_hash(program.tensors),
        contract=contract,
        tensors=program.tensors,
        phases=tuple(_phase(program, phase, compiled[id(phase.step)]) for phase in program.phases),
        upload=replace(
            strategy.info.upload(),
            codec=strategy.compression.update_codec,
            clip=strategy.privacy.device_clip,
            noise=strategy.privacy.device_noise,
        ),
        keep_local=strategy.info.kept_local,
        budget=budget,
        seed=seed,
        downlink=strategy.downlink.codec,
    )
    check_record(plan, strategy.privacy.record)
    return plan, {graph.digest: graph.data for graph in compiled.values()}


def _check_contract(model: Classifier, contract: InputContract) -> None:
    spec = model.spec
    has = (spec.channels, spec.window, spec.classes)
    needs = (len(contract.channels), contract.window, len(contract.labels))
    if has != needs:
        raise ConfigError(
            f"the model takes (channels, window, classes) {has} but the contract has {needs}; use the manifest that "
            "was exported with this model"
        )


def _example(program: ClientProgram, phase: ClientPhase, contract: InputContract) -> dict[str, Tensor]:
    size = phase.loop.batch_size
    state = {spec.name: _zeros(spec) for spec in program.tensors}
    batch = {
        "x": torch.zeros(size, len(contract.channels), contract.window),
        "y": torch.zeros(size, dtype=torch.int64),
        "weight": torch.zeros(size),
        "rng": torch.zeros((), dtype=torch.int64),
        "noise": torch.zeros(phase.noise),
        "expected": torch.zeros(()),
    }
    return {**state, **batch, **{name: torch.zeros(()) for name, _ in phase.scalars}}


def _zeros(spec: TensorSpec) -> Tensor:
    return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))


def _phase(program: ClientProgram, phase: ClientPhase, graph: CompiledGraph) -> Phase:
    state = {spec.name for spec in program.tensors}
    return Phase(
        name=phase.name,
        graph=graph.digest,
        graph_bytes=len(graph.data),
        inputs=tuple(_input(name, state) for name in graph.inputs),
        outputs=tuple(_output(name, state) for name in graph.outputs),
        loop=phase.loop,
        scalars=phase.scalars,
        when=phase.when,
        noise=phase.noise,
    )


def _input(name: str, state: set[str]) -> InputBinding:
    if name in state:
        return InputBinding(name, "state", name)
    return InputBinding(name, "batch" if name in BATCH_INPUTS else "scalar", name)


def _output(name: str, state: set[str]) -> OutputBinding:
    if name in state:
        return OutputBinding(OUTPUT_PREFIX + name, "state", name)
    return OutputBinding(OUTPUT_PREFIX + name, "metric", name, "sum")
