# SPDX-License-Identifier: Apache-2.0
"""The common part of all modules: their description, options that are given when a module is loaded, and the
call by a Trainer."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, cast, get_args

import datasets
import evaluate
import numpy as np

from hf_ssl.errors import UserError, check_keys, counted

ROW = datasets.Sequence(datasets.Value("float32"))
"""Type of a row of numbers for each image, such as a feature."""
NUMBER = datasets.Value("int64")
"""Type of one whole number for each image, such as a class number."""
_KINDS: tuple[tuple[type, Any, str], ...] = (
    (bool, bool, "True or False"),
    (int, numbers.Integral, "a whole number"),
    (float, numbers.Real, "a number"),
    (tuple, (list, tuple), "a list"),
)
"""Type of a default value, accepted types, and these types in words."""


class WithOptions:
    """Base of the modules, beside a class of the `evaluate` library. It is not a module itself.

    A subclass defines `measure(predictions, references, *, option=default, ...)`, which returns a dict of
    numbers.

    Attributes:
        about: description, description of the inputs, BibTeX entry of the paper, and its address.
        layouts: types of the accepted inputs. With several entries, the first one that fits is used.
    """

    measure: Callable[..., dict[str, float]]
    about: ClassVar[tuple[str, str, str, str]]
    layouts: ClassVar[tuple[dict[str, Any], ...]] = ({"predictions": ROW, "references": NUMBER},)

    def _info(self) -> evaluate.MetricInfo:
        description, inputs, citation, address = self.about
        layouts = [datasets.Features(layout) for layout in self.layouts]
        return evaluate.MetricInfo(
            description=description,
            citation=citation,
            inputs_description=inputs,
            features=layouts if len(layouts) > 1 else layouts[0],
            reference_urls=[address],
            license="Apache-2.0",
        )

    def __init__(self, *args: Any, **arguments: Any) -> None:
        """Keep the options of `measure`. The other arguments are those of `evaluate.EvaluationModule`."""
        own = inspect.signature(evaluate.EvaluationModule.__init__).parameters
        self.options = {key: value for key, value in arguments.items() if key not in own}
        self._check(self.options)
        super().__init__(*args, **{key: value for key, value in arguments.items() if key in own})

    def _check(self, options: dict[str, Any]) -> None:
        parameters = inspect.signature(self.measure).parameters.values()
        known = {each.name: each for each in parameters if each.kind == each.KEYWORD_ONLY}
        check_keys(options, known, type(self).__name__)
        for name, value in options.items():
            default, annotation = known[name].default, known[name].annotation
            if value is None and (default is None or type(None) in get_args(annotation)):
                continue
            for kind, accepted, words in _KINDS:
                if isinstance(default, kind):
                    if not isinstance(value, accepted) or isinstance(value, bool) is not (kind is bool):
                        raise UserError(
                            f"{type(self).__name__}: expected {words} for {name}, got {value!r}; the default "
                            f"is {default}"
                        )
                    break

    def compute(self, *, predictions: Any = None, references: Any = None, **options: Any) -> Any:
        """Return the numbers for all rows; see `evaluate.EvaluationModule.compute`.

        Raises:
            UserError: there are no rows, an argument is missing, or the shapes are wrong.
        """
        module: Any = self
        given = {"predictions": predictions, "references": references}
        given = {name: rows for name, rows in given.items() if rows is not None}
        self._check_rows(given)
        if not given and module.num_process == 1 and module.writer is None:
            raise UserError(
                f"{self._label}: expected {self._wanted}, got none; give them to compute, or call add_batch "
                "first"
            )
        return super().compute(**given, **options)  # type: ignore[misc]

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Add rows; see `evaluate.EvaluationModule.add_batch`. Raises UserError for wrong shapes."""
        given = {"predictions": predictions, "references": references}
        given = {name: rows for name, rows in given.items() if rows is not None}
        self._check_rows(given)
        super().add_batch(**given, **others)  # type: ignore[misc]

    @property
    def _label(self) -> str:
        return str(cast(Any, self).name)

    @property
    def _wanted(self) -> str:
        return " and ".join(cast(Any, self)._feature_names())

    def _check_rows(self, given: dict[str, Any]) -> None:
        """Raise UserError for missing arguments, different numbers of rows, or wrong shapes."""
        module: Any = self
        layouts = module.features if isinstance(module.features, list) else [module.features]
        names = module._feature_names()
        if not given:
            return
        if missing := [name for name in names if name not in given]:
            raise UserError(f"{self._label}: expected {self._wanted}, got no {missing[0]}; give both")
        for name in names:
            rows = given[name]
            if not hasattr(rows, "__len__") or (getattr(rows, "ndim", 1) == 0):
                raise UserError(f"{self._label}: expected {name} of several images, got {rows!r}; use a list")
            if len(rows) == 0:
                raise UserError(f"{self._label}: expected {name} of at least one image, got none")
            found = _dimensions(rows)
            fitting = [layout[name] for layout in layouts if _is_row(layout[name]) == (found > 1)]
            numbers = [kind.feature if _is_row(kind) else kind for kind in fitting]
            is_whole = bool(numbers) and all(number.dtype == "int64" for number in numbers)
            if is_whole and not _are_whole(rows):  # the library would cut the fractions
                wanted = "labels 1, 0 or -1" if found > 1 else "class numbers"
                raise UserError(f"{self._label}: expected {wanted} as {name}, got other values")
            kinds = {2 if _is_row(layout[name]) else 1 for layout in layouts}
            if found not in kinds:
                shapes = {1: "one number for each image (N,)", 2: "a row of numbers for each image (N, D)"}
                wanted = " or ".join(shapes[kind] for kind in sorted(kinds))
                raise UserError(
                    f"{self._label}: expected {name} with {wanted}, got {counted(found, 'dimension')}; use "
                    "another shape"
                )
        sizes = [len(given[name]) for name in names]
        if len(set(sizes)) > 1:
            raise UserError(
                f"{self._label}: expected {self._wanted} of the same images, got {sizes[0]} and {sizes[1]}; "
                "give both for each image"
            )

    def _compute(self, predictions: Any, references: Any = None, **options: Any) -> dict[str, float]:
        """Return the numbers for all collected rows; the library calls this method."""
        self._check(options)
        inputs = {"predictions": predictions} | ({} if references is None else {"references": references})
        return self.measure(**inputs, **(self.options | options))

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Return the numbers for the predictions of a Trainer, an `EvalPrediction`.

        If the model returns several outputs, the first one is evaluated: logits or features.

        Raises:
            UserError: the metric needs labels, and the Trainer found none.
        """
        module: Any = self
        outputs = prediction.predictions
        inputs = {"predictions": outputs[0] if isinstance(outputs, tuple) else outputs}
        if "references" in module._feature_names():
            if prediction.label_ids is None:
                raise UserError(
                    f"{type(self).__name__}: expected labels, got none from the Trainer; set label_names"
                )
            inputs["references"] = prediction.label_ids
        return module.compute(**inputs)


def _is_row(kind: Any) -> bool:
    return isinstance(kind, datasets.List)


def _are_whole(rows: Any) -> bool:
    """Return whether all values are whole numbers. Rows can be a tensor on a GPU."""
    rows = rows.detach().cpu() if hasattr(rows, "detach") else rows
    try:
        return bool((np.asarray(rows, np.float64) % 1 == 0).all())
    except (TypeError, ValueError):  # such as texts
        return False


def _dimensions(rows: Any) -> int:
    """Return the number of dimensions of an array, a tensor or nested lists."""
    if hasattr(rows, "ndim"):
        return int(rows.ndim)
    if isinstance(rows, list | tuple) and len(rows):
        return 1 + _dimensions(rows[0])
    return int(hasattr(rows, "__len__") and not isinstance(rows, str))
