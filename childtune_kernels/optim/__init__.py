"""The optimizer and what belongs to it."""

from .adamw import ChildAdamW as ChildAdamW
from .memory import Memory as Memory
from .memory import predict as predict
