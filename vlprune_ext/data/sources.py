"""Names of the built-in data sources. Importing this module imports nothing, so that the help can list them."""

from __future__ import annotations

DIGITS = "digits"
DIGITS_CLASSES = "digits-classes"
DIGITS_QUESTIONS = "digits-questions"
SOURCES = {
    DIGITS: "scenes of digits with a caption each",
    DIGITS_CLASSES: "scenes of one digit, the digits as classes",
    DIGITS_QUESTIONS: "scenes with a question and its answer",
}
