"""The conformance kit: one class that a family's test subclasses, and what it is written with.

    from porttool.testing import FamilyConformance, redraw

    class MyFamilyConformance(FamilyConformance):
        family = "my_family"

        def write_source(self, path, seed):
            from transformers import MyConfig, MyForCausalLM

            redraw(MyForCausalLM(MyConfig(...)), seed).save_pretrained(path)

Where transformers has the model, a `TransformersConformance` says it in fewer words.
A plugin `porttool_my_family` keeps it in `porttool_my_family/conformance.py`: that is where
`porttool plugins check my_family` finds it. pytest runs it when a class whose name begins with
`Test` subclasses it. Importing this imports neither pytest nor torch.
"""

from porttool.testing.cases import CheckResult, find_cases, run_checks
from porttool.testing.family import FamilyConformance
from porttool.testing.layouts import REFERENCE, TransformersConformance
from porttool.testing.reference import redraw, transformers_logits, widened

__all__ = [
    "REFERENCE",
    "CheckResult",
    "FamilyConformance",
    "TransformersConformance",
    "find_cases",
    "redraw",
    "run_checks",
    "transformers_logits",
    "widened",
]
