"""Which out-of-distribution score is the better default: AUROC on real people.

Run: ``python tests/benchmarks/bench_ood.py [--dataset hapt] [--data-root DIR] [--steps N] [--groups N]`` from the
repository root. For each of the first person groups (specs/ood.md 1.2) the CNN is trained on the others, one person
in five of them kept for validation. Against the windows of the validation people:

* unseen activity: windows of the same people in an activity that was left out of training (higher = better);
* turned sensor: the same windows with the axes turned by 120 degrees (higher = better);
* unseen person: windows of the held-out people in known activities (0.5 = does not cry wolf over new people);
* errors: wrongly against rightly recognised windows of the held-out people (does the score find mistakes?).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy
from wearfleet_cloud.data import dataset_named
from wearfleet_cloud.data.prepared import default_cache_dir, prepare
from wearfleet_cloud.data.scenarios import person_groups
from wearfleet_cloud.data.standardisation import standardisation_of
from wearfleet_cloud.export.ood_score import fit_tied_gaussian
from wearfleet_cloud.export.scored_classifier import OodStatistics, embed, outputs_of, scored_classifier
from wearfleet_cloud.training.trainer import model_spec_for
from wearfleet_models import Classifier, ModelSpec, build_classifier

RANKS = (4, 8, 16, 32, 10_000)


def trained(spec: ModelSpec, x: np.ndarray, y: np.ndarray, steps: int, seed: int) -> Classifier:
    model = build_classifier(spec, seed)
    mean, std = standardisation_of(x)
    model.standardise.mean.copy_(torch.from_numpy(mean))
    model.standardise.std.copy_(torch.from_numpy(std))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(steps):
        index = torch.randint(len(y), (96,), generator=generator)
        optimiser.zero_grad()
        cross_entropy(model(inputs[index]), labels[index]).backward()
        optimiser.step()
    return model.eval()


def scorers(model: Classifier, x: np.ndarray, y: np.ndarray) -> dict[str, OodStatistics]:
    embedding = embed(model, x)
    found = {"energy": OodStatistics("energy", 0.0, None)}
    for rank in RANKS:
        name = "full rank" if rank >= embedding.shape[1] else f"rank {rank}"
        found[f"mahalanobis {name}"] = OodStatistics(
            "mahalanobis", 0.0, fit_tied_gaussian(embedding, y, rank)
        )
    return found


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    truth = np.concatenate((np.zeros(len(inside)), np.ones(len(outside))))
    return float(roc_auc_score(truth, np.concatenate((inside, outside))))


def turned(x: np.ndarray) -> np.ndarray:
    """Axes x, y, z become y, z, x: a rotation by 120 degrees about the diagonal."""
    return np.ascontiguousarray(x[:, [1, 2, 0, 4, 5, 3]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="hapt")
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare(dataset_named(given.dataset), given.data_root, default_cache_dir())
    windows, spec = prepared.windows, model_spec_for(prepared.dataset)
    left_out = range(0, spec.classes, max(1, spec.classes // 4))
    results: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for group, held in enumerate(person_groups(prepared)[: given.groups]):
        target = np.isin(windows.subject, held)
        others = np.unique(windows.subject[~target])
        validation = np.isin(windows.subject, others[::5])
        train = ~target & ~validation
        model = trained(spec, np.array(windows.x[train]), windows.activity[train], given.steps, group)
        x_validation, x_target = np.array(windows.x[validation]), np.array(windows.x[target])
        for name, ood in scorers(model, np.array(windows.x[train]), windows.activity[train]).items():
            scored = scored_classifier(model, ood)
            known, new = outputs_of(scored, x_validation)["ood_score"], outputs_of(scored, x_target)
            results["turned sensor", name].append(
                auroc(known, outputs_of(scored, turned(x_validation))["ood_score"])
            )
            results["unseen person", name].append(auroc(known, new["ood_score"]))
            wrong = new["logits"].argmax(axis=1) != windows.activity[target]
            results["errors", name].append(auroc(new["ood_score"][~wrong], new["ood_score"][wrong]))
        for activity in left_out:
            kept = windows.activity != activity
            y = windows.activity - (windows.activity > activity)
            x = np.array(windows.x[train & kept])
            less = trained(replace(spec, classes=spec.classes - 1), x, y[train & kept], given.steps, group)
            for name, ood in scorers(less, x, y[train & kept]).items():
                scored = scored_classifier(less, ood)
                known = outputs_of(scored, np.array(windows.x[validation & kept]))["ood_score"]
                unseen = outputs_of(scored, np.array(windows.x[validation & ~kept]))["ood_score"]
                results["unseen activity", name].append(auroc(known, unseen))
    cases = ("unseen activity", "turned sensor", "unseen person", "errors")
    print(f"{given.dataset}, {given.groups} groups, {given.steps} steps: mean AUROC")
    print(f"{'score':26}" + "".join(f"{case:>17}" for case in cases))
    for name in dict.fromkeys(name for _, name in results):
        print(f"{name:26}" + "".join(f"{np.mean(results[case, name]):17.3f}" for case in cases))


if __name__ == "__main__":
    main()
