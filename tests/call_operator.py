"""Call an operator of a native library without PyTorch's Python part, so that any Python can.

    python call_operator.py FOLDER_OF_LIBTORCH LIBRARY

It goes through the same C functions of PyTorch that the library uses, and compares KD's loss with its formula.
"""

from __future__ import annotations

import ctypes
import math
import random
import struct
import sys
from pathlib import Path

FLOAT, CPU, BUILT_WITH = 6, 0, 0x020B000000000000
ROWS, CLASSES, TEMPERATURE = 3, 5, 4.0


def main() -> None:
    folder, library = map(Path, sys.argv[1:])
    torch = ctypes.CDLL(str(folder / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
    student, teacher = ([random.gauss(0, 1) for _ in range(ROWS * CLASSES)] for _ in range(2))
    arguments = [tensor(torch, student), tensor(torch, teacher), of_float(TEMPERATURE), of_float(1.0), 0, 0]
    stack = (ctypes.c_uint64 * len(arguments))(*arguments)
    check(torch.torch_call_dispatcher(b"kdkernels::kd", b"", stack, ctypes.c_uint64(BUILT_WITH)))
    data = ctypes.c_void_p()
    check(torch.aoti_torch_get_data_ptr(ctypes.c_void_p(stack[0]), ctypes.byref(data)))
    found = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))[0]
    expected = sum(divergence(row(student, i), row(teacher, i)) for i in range(ROWS)) / ROWS
    assert math.isclose(found, expected, rel_tol=1e-5), (found, expected)
    sys.stdout.write(f"Python {sys.version.split()[0]}: {found:.6f}, expected {expected:.6f}\n")


def tensor(torch: ctypes.CDLL, values: list[float]) -> int:
    """Return the handle of a float32 tensor of shape (ROWS, CLASSES)."""
    data = (ctypes.c_float * len(values))(*values)
    kept.append(data)
    sizes, strides = (ctypes.c_int64 * 2)(ROWS, CLASSES), (ctypes.c_int64 * 2)(CLASSES, 1)
    numbers = (ctypes.c_int64(0), ctypes.c_int32(FLOAT), ctypes.c_int32(CPU), ctypes.c_int32(0))
    handle = ctypes.c_void_p()
    make = torch.aoti_torch_create_tensor_from_blob
    check(make(data, ctypes.c_int64(2), sizes, strides, *numbers, ctypes.byref(handle)))
    return handle.value


kept: list[ctypes.Array] = []


def of_float(value: float) -> int:
    """Return the bits with which a float travels on the stack."""
    return struct.unpack("Q", struct.pack("d", value))[0]


def check(error: int) -> None:
    assert error == 0, f"PyTorch's C function returned {error}"


def row(values: list[float], index: int) -> list[float]:
    return values[index * CLASSES : (index + 1) * CLASSES]


def divergence(student: list[float], teacher: list[float]) -> float:
    """KL(teacher, student) of softmaxes at the temperature."""
    p, q = softmax(teacher), softmax(student)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x / TEMPERATURE) for x in logits]
    return [power / sum(powers) for power in powers]


if __name__ == "__main__":
    main()
