"""What holds for all tests: one thread, since the tensors are small and threads that wait for each other are slow."""

import torch

torch.set_num_threads(1)
