"""Child-Tuning_F and Child-Tuning_D on a small model, on any device, in seconds: python examples/quickstart.py"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from childtune_kernels import ChildAdamW, estimate_fisher

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
inputs = torch.randn(64, 20, device=device)
labels = (inputs[:, 0] + inputs[:, 1] > 0).long()  # stands for your labelled data
batches = list(zip(inputs.split(16), labels.split(16), strict=True))
unseen = torch.randn(2000, 20, device=device)  # stands for data that nobody trains on


def pretrained_model() -> nn.Module:
    """Stands for a model that somebody has trained before."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)


def per_example_loss(model: nn.Module, batch) -> torch.Tensor:
    """One loss an example: what Fisher information is made of."""
    x, y = batch
    return cross_entropy(model(x), y, reduction="none")


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Train as with any torch optimizer, and return the last loss."""
    for _ in range(50):
        for x, y in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    return loss.item()


@torch.no_grad()
def result(model: nn.Module, loss: float) -> str:
    """Say how a model does on what it was trained on, and on what it was not: only the second counts."""
    right = (model(unseen).argmax(1) == (unseen[:, 0] + unseen[:, 1] > 0)).double().mean()
    return f"training loss {loss:.3f}, held-out accuracy {100 * right:.1f} %"


def main() -> None:
    """Fine-tune the same model three times."""
    model = pretrained_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    print(f"vanilla AdamW: {result(model, train(model, optimizer))}\n")

    # F: at every step a fresh 30 % of the gradient, multiplied by 1/0.3
    model = pretrained_model()
    optimizer = ChildAdamW(model.named_parameters(), lr=3e-3, reserve_p=0.3, seed=0)
    print(f"Child-Tuning_F: {result(model, train(model, optimizer))}\n{optimizer.describe()}\n")

    # D: the 10 % of the hidden layers' weights with the highest Fisher information; the head (layer 4) is trained fully
    model = pretrained_model()
    fisher = estimate_fisher(model, batches, per_example_loss)
    mask = fisher.top(0.1, scope=lambda name: not name.startswith("4."))
    scope = {name: param for name, param in model.named_parameters() if name in mask}
    before = {name: param.detach().clone() for name, param in scope.items()}
    optimizer = ChildAdamW(model.named_parameters(), lr=3e-3, mask=mask)
    print(f"Child-Tuning_D: {result(model, train(model, optimizer))}\n{optimizer.describe()}")
    moved = sum(int((param != before[name]).sum()) for name, param in scope.items())
    weights = sum(param.numel() for param in scope.values())
    print(f"{mask!r}: {moved:,} of the hidden layers' {weights:,} weights have moved")


if __name__ == "__main__":
    main()
