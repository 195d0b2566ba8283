"""Reads labelled texts for sparse probing: from folders, from the Python installation, or by sae-bench's loaders."""

import sys
from pathlib import Path

from pipeline.runtime.compatibility import importing_sae_bench, quiet_hub
from pipeline.texts import files, python
from pipeline.texts.python import TextsByClass
from pipeline.texts.text_sections import ProbesConfig, is_probe_folder


def load_texts(name: str, probes: ProbesConfig) -> tuple[TextsByClass, TextsByClass]:
    """Training and test texts of a data set by class, half of `train_size` and of `test_size` for each class.

    Half, because sae-bench's probes are binary and balanced: half of a probe's texts are of its class. Raises BadInputError
    for a data set that cannot be read or is too small.
    """
    dataset, train, test = probes.named[name], probes.train_size // 2, probes.test_size // 2
    if is_probe_folder(dataset):
        return files.probe_texts(Path(dataset), train, test, probes.seed)
    if dataset in python.TASKS:
        return _told(dataset, python.probe_texts(dataset, train, test, probes.seed))
    with importing_sae_bench():
        from sae_bench.sae_bench_utils import dataset_utils
        from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset

    with files.reading(f"probe data set {dataset}"), quiet_hub():
        both = dataset_utils.get_multi_label_train_test_data(dataset, probes.train_size, probes.test_size, probes.seed)
    by_split = [dataset_utils.filter_dataset(texts, chosen_classes_per_dataset[dataset]) for texts in both]
    return _told(dataset, (by_split[0], by_split[1]))


def _told(dataset: str, both: tuple[TextsByClass, TextsByClass]) -> tuple[TextsByClass, TextsByClass]:
    """The texts themselves, after a line that says how many are no new ones, if any."""
    train, test = ([text for texts in by_class.values() for text in set(texts)] for by_class in both)
    repeated = sum(len(texts) - len(set(texts)) for by_class in both for texts in by_class.values())
    seen = len(set(test) & set(train))
    if repeated or seen:
        print(
            f"{dataset}: {repeated} texts are drawn more than once within a class, and {seen} test texts are also training "
            "texts; all stay, so that results on this data set are comparable",
            file=sys.stderr,
        )
    return both
