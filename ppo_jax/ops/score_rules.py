"""The rules by which the score of a response becomes a reward, by name.

This module does not import JAX, so that the command line can list the names quickly.
"""

import enum


class ScoreAt(enum.Enum):
    """The step whose reward includes the score of the response.

    Attributes:
      LAST_TOKEN: the last real token.
      AFTER_LAST_TOKEN: the step after the last real token, or step `R - 1` if that token is there.
      LAST_INDEX: step `R - 1`, even if it is padding.

    Example:
      >>> ScoreAt("last_token")
      <ScoreAt.LAST_TOKEN: 'last_token'>
    """

    LAST_TOKEN = "last_token"
    AFTER_LAST_TOKEN = "after_last_token"
    LAST_INDEX = "last_index"


class MissingEOS(enum.Enum):
    """The rule for the score of a response that was cut off before an end token.

    Attributes:
      KEEP: keep the score.
      PENALIZE: subtract the penalty from the score.
      REPLACE: replace the score by minus the penalty.

    Example:
      >>> MissingEOS("penalize")
      <MissingEOS.PENALIZE: 'penalize'>
    """

    KEEP = "keep"
    PENALIZE = "penalize"
    REPLACE = "replace"
