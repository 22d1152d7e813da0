"""A user's file with functions, networks and rewards for flows: some right, and some wrong in every way there is."""

from pathlib import Path

SOURCE = '''
import torch
import stepwell as sw

def velocity(x, t):
    """The exact velocity of standard normal data on the linear path."""
    return x * (2 * t - 1) / (t * t + (1 - t) ** 2)

def labelled(x, t, label):
    """Standard normal data around the label in every coordinate."""
    mean = label.to(x).reshape(-1, *[1] * (x.dim() - 1))
    return velocity(x - (1 - t) * mean, t) - mean

class Moved(torch.nn.Module):
    """The same, and a correction that can learn to move it."""

    def __init__(self, size=2, dtype=torch.float32):
        super().__init__()
        self.correction = torch.nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, x, t):
        return velocity(x, t.reshape(-1, *[1] * (x.dim() - 1))) + self.correction

network = Moved()

def make():
    return sw.flow(Moved(), (2,), steps=5)

def make_wide():
    return sw.flow(Moved(3), (3,))

def make_half():
    return sw.flow(Moved(dtype=torch.float16), (2,))

def make_images():
    return sw.flow(velocity, (3, 8, 8), decode=lambda x: x.sigmoid())

def make_nothing():
    return None

def make_broken():
    return sw.flow(velocity, (2,), steps=0)

def not_a_number(x, t):
    return x * float("nan")

def narrow(x, t):
    return x[:, :1]

def a_list(x, t):
    return x.tolist()

def fails(x, t):
    numbers = {}
    return numbers["velocity"]

def three(x, t, y):
    return x

def right(completions, **columns):
    return [float(point[0]) for point in completions]

def pull(completions, **columns):
    return torch.stack(list(completions))[:, 0]

def without_gradient(completions, **columns):
    return torch.stack(list(completions))[:, 0].detach()

def in_numpy(completions, **columns):
    return [float(point.numpy()[0]) for point in completions]

def one_number(completions, **columns):
    return torch.stack(list(completions)).sum()

def dark(completions, **columns):
    return [-float(image.mean()) for image in completions]
'''


def write_file(folder: Path) -> None:
    (folder / "my.py").write_text(SOURCE)
