"""Labelled texts for sparse probing: sae-bench's own loaders, or tasks made from the Python installation."""

from pipeline.compatibility import importing_sae_bench
from pipeline.errors import BadInputError
from pipeline.experiment import ProbesConfig
from pipeline.extract import python_text

Texts = dict[str, list[str]]
"""Class name to texts."""


def load_texts(dataset: str, probes: ProbesConfig) -> tuple[Texts, Texts]:
    """Train and test texts of a data set by class: half of `train_size` and of `test_size` for each class.

    Half, because sae-bench trains one balanced binary probe per class. Raises BadInputError for an unknown data set or one
    that cannot be had.
    """
    if dataset.startswith(python_text.PREFIX):
        return python_text.probe_texts(dataset, probes.train_size // 2, probes.test_size // 2, probes.seed)
    with importing_sae_bench():
        from sae_bench.sae_bench_utils import dataset_utils
        from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset

    if dataset not in chosen_classes_per_dataset:
        known = ", ".join([*chosen_classes_per_dataset, *python_text.TASKS])
        raise BadInputError(f"probes.datasets: unknown data set {dataset!r}; known: {known}")
    try:
        train, test = dataset_utils.get_multi_label_train_test_data(
            dataset, probes.train_size, probes.test_size, probes.seed
        )
    except (OSError, ValueError) as error:
        raise BadInputError(f"probe data set {dataset} cannot be had: {' '.join(str(error).split())}") from None
    classes = chosen_classes_per_dataset[dataset]
    return dataset_utils.filter_dataset(train, classes), dataset_utils.filter_dataset(test, classes)
