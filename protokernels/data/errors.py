# SPDX-License-Identifier: MIT
"""The one error of data sets."""


class DataError(ValueError):
    """A data set is unknown, missing, damaged or not supported; the message says which, and what to do."""
