"""The one exception for what the user can mend.

Entry points turn it into its sentence on stderr and exit code 2, without a traceback; anything
else that escapes is a defect of ours and keeps its traceback.
"""

import os


class UserError(ValueError):
    """One sentence: what was found, what was expected, and which key, file or sample."""


def check_no_interpreter() -> None:
    """Raises UserError where the environment would run the kernels in Triton's interpreter: hundreds of times
    slower, and its products of bf16 are wrong."""
    value = os.environ.get("TRITON_INTERPRET", "")
    if value.lower() in ("1", "true", "on", "yes", "y"):
        raise UserError(
            f"TRITON_INTERPRET is {value} in the environment, which runs kernels in Triton's interpreter, "
            "for tests of the kernels alone; unset it"
        )
