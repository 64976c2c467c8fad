"""Exact empirical Fisher information (Eq. 10) at the cost of about one ordinary backward pass."""

from .estimate import estimate_fisher as estimate_fisher
from .information import Fisher as Fisher
from .losses import causal_lm_loss as causal_lm_loss
from .losses import classification_loss as classification_loss
from .losses import regression_loss as regression_loss
from .losses import token_loss as token_loss
