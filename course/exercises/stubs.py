"""Write the exercises: `python -m course.exercises.stubs [FOLDER]`.

A stub is the signature and the docstring of a function of the project, without its body. So the
exercises cannot differ from the project, and the project's functions are the solutions.
"""

import ast
import inspect
import sys
import textwrap
from pathlib import Path

import cache
import model
import segment
import sentencekv
from support import slots

EXERCISES = {  # the number of the lesson, the function, and what its body may use
    "02_attend": (model.Attention.attend, "import torch.nn.functional as F"),
    "03_is_end": (segment.is_end, "from segment import (ABBREVIATED, GOES_ON, INSIDE, MARK_END,"
                  " OPENING, WIDE_END, ends_line,\n                     one_holds, starts_item)"),
    "04_sentence_bounds": (sentencekv.sentence_bounds,
                           "import torch\nimport torch.nn.functional as F"),
    "05_sentence_vectors": (sentencekv.sentence_vectors,
                            "import torch\nimport torch.nn.functional as F"),
    "06_mean_query": (sentencekv.mean_query, "import torch"),
    "06_gaussian": (sentencekv.gaussian, "import math\n\nimport torch"),
    "07_token_importance": (sentencekv.token_importance,
                            "import math\n\nimport torch\nimport torch.nn.functional as F"),
    "07_select_rows": (sentencekv.select_rows,
                       "import math\n\nimport torch\n\nfrom support.settings import MAX_COUNT"),
    "08_assign_slots": (slots.assign_slots, "import torch\n\nfrom cache import NO_ROW"),
    # A layer's seal has all of lessons 4 to 8 in five lines. The cache's counts, and calls it.
    "09_seal": (cache.LayerCache.seal, "import torch"),
}


def stub(function, imports: str) -> str:
    """The text of an exercise: imports, signature, docstring, and no body."""
    source = textwrap.dedent(inspect.getsource(function))
    (definition,) = ast.parse(source).body
    docstring = definition.body[0]
    assert ast.get_docstring(definition), f"{function.__qualname__} has no docstring"
    head = "\n".join(source.splitlines()[: docstring.end_lineno])
    return f"{imports}\n\n\n{head}\n    raise NotImplementedError\n"


def write(folder: Path):
    for name, (function, imports) in EXERCISES.items():
        (folder / f"{name}.py").write_text(stub(function, imports), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
