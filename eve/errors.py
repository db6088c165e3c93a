"""The one exception for what the user can mend.

Entry points turn it into its sentence on stderr and exit code 2, without a traceback; anything
else that escapes is a defect of ours and keeps its traceback.
"""


class UserError(ValueError):
    """One sentence: what was found, what was expected, and which key, file or sample."""
