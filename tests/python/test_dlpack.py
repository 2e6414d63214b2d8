"""Tensors in and out: nothing is copied, everything foreign is checked, and what is handed over is let go of once."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moda_attn import _native, dlpack
from moda_attn import functional as F
from moda_attn import numpy as N
from moda_attn.errors import ModaMemoryError, ModaTypeError, ModaValueError

# What a deleter raises nobody catches: it must count.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

TORCH_DTYPES = {
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


class OldProducer:
    """Speaks DLPack as libraries did before version 1.0: no keyword arguments."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def __dlpack__(self):
        return self.tensor.__dlpack__()


class NewProducer:
    """Speaks versioned DLPack, and torch's manners: it refuses while it requires a gradient."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.requires_grad = tensor.requires_grad
        self.asked: list[object] = []

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, max_version=None):
        self.asked.append(max_version)
        return self.tensor.__dlpack__(max_version=max_version)

    def detach(self) -> NewProducer:
        twin = NewProducer(self.tensor.detach())
        twin.asked = self.asked
        return twin


class OnDevice:
    """Claims to live on another device; asking it for its tensor is a mistake."""

    def __init__(self, device: tuple[int, int]):
        self.device = device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        raise AssertionError("the device comes first")


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_torch_tensor_is_read_where_it_lies(dtype: torch.dtype):
    tensor = torch.ones(3, 4).to(dtype)
    assert _native.describe("tensor", tensor) == ((3, 4), TORCH_DTYPES[dtype], tensor.data_ptr())
    view = tensor[1:, 2:]
    assert _native.describe("tensor", view) == ((2, 2), TORCH_DTYPES[dtype], view.data_ptr())


@pytest.mark.parametrize("producer", [OldProducer, NewProducer])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32])
def test_a_capsule_is_read_where_it_lies(producer: type, dtype: torch.dtype):
    tensor = torch.arange(12).to(dtype).reshape(3, 4)[:, 1:]
    assert _native.describe("tensor", producer(tensor)) == ((3, 3), TORCH_DTYPES[dtype], tensor.data_ptr())


def test_the_versioned_form_is_asked_for():
    producer = NewProducer(torch.ones(2, requires_grad=True))
    _native.describe("tensor", producer)
    assert producer.asked == [(1, 0)]


@pytest.mark.parametrize("dtype", ["bool", "u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8"])
def test_a_numpy_array_is_read_where_it_lies(dtype: str):
    array = np.ones((4, 6), dtype)[::-1, ::2]
    assert _native.describe("tensor", array) == ((4, 3), array.dtype.name, array.ctypes.data)
    array.flags.writeable = False
    assert _native.describe("tensor", array)[2] == array.ctypes.data


def test_a_parameter_and_a_tensor_subclass_have_an_exchange_api_too():
    class Mine(torch.Tensor):
        pass

    for tensor in (torch.nn.Parameter(torch.ones(3)), torch.ones(3).as_subclass(Mine)):
        assert _native.describe("tensor", tensor)[2] == tensor.data_ptr()


def attention_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, 5, 4), torch.zeros(1, 5, dtype=torch.int64)


@pytest.mark.parametrize("wrap", [lambda t: t, OldProducer, NewProducer, lambda t: t.numpy()])
def test_results_are_written_where_they_lie(wrap):
    tensor, ids = attention_inputs()
    wanted = F.modular_attention(tensor, tensor, tensor, ids)
    out, lse = torch.full_like(tensor, torch.nan), torch.full((1, 2, 1, 5), torch.nan)
    given = (tensor, tensor, tensor, ids, None, True, None, None, None, None, "joint", None, "none")
    _native.attend_forward(*given, wrap(out), wrap(lse), None, None, 1)
    assert torch.equal(out, wanted)
    assert not lse.isnan().any()


def test_strides_of_every_kind_give_the_same_result():
    tensor, ids = attention_inputs()
    wanted = N.modular_attention(tensor.numpy(), tensor.numpy(), tensor.numpy(), ids.numpy())
    mirrored = tensor.numpy()[..., ::-1].copy()[..., ::-1]
    sliced = np.repeat(tensor.numpy(), 2, axis=2)[:, :, ::2]
    transposed = tensor.numpy().transpose(3, 2, 1, 0).copy().transpose(3, 2, 1, 0)
    assert {s < 0 for s in mirrored.strides} == {True, False}
    for array in (mirrored, sliced, transposed):
        assert np.array_equal(N.modular_attention(array, array, array, ids.numpy()), wanted)
    one = tensor[:, :1].expand(1, 2, 5, 4)
    assert torch.equal(F.modular_attention(one, one, one, ids), F.modular_attention(*[one.clone()] * 3, ids))


# What cannot be right is refused before it is read.


def test_a_fake_tensor_has_no_data():
    with FakeTensorMode():
        fake = torch.ones(2, 3)
    with pytest.raises((ModaValueError, RuntimeError), match=r"data|storage"):
        _native.describe("tensor", fake)


def test_a_tensor_without_elements_needs_no_data():
    assert _native.describe("tensor", torch.empty(0, 3))[0] == (0, 3)
    assert _native.describe("tensor", np.empty((2, 0)))[0] == (2, 0)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(2).to(torch.float8_e5m2), "float8_e5m2"),
        (np.ones(2, np.complex128), "complex128"),
        (np.ones(2, ">f4"), ">f4"),
        (np.ones(2, "datetime64[s]"), "datetime64"),
    ],
)
def test_a_dtype_that_is_not_supported_is_named(tensor: object, name: str):
    with pytest.raises(ModaTypeError, match=f"tensor has dtype {name}"):
        _native.describe("tensor", tensor)


@pytest.mark.parametrize(
    ("device", "name"),
    [((2, 1), "cuda:1"), ((8, 0), "mps:0"), ((10, 0), "rocm:0"), ((99, 3), "DLPack device type 99:3")],
)
def test_another_device_is_named(device: tuple[int, int], name: str):
    with pytest.raises(ModaValueError, match=f"tensor is on device {name}; wanted cpu"):
        _native.describe("tensor", OnDevice(device))


def test_a_misaligned_array_is_refused():
    array = np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float32)
    with pytest.raises(ModaValueError, match="not aligned to its elements of 4 bytes"):
        _native.describe("tensor", array)
    record = np.zeros(4, np.dtype([("a", "f4"), ("b", "u1")]))["a"]
    with pytest.raises(ModaValueError, match="not aligned"):
        _native.describe("tensor", record)


@pytest.mark.parametrize("thing", [None, [1.0], 3, "x", torch.float32])
def test_what_is_not_a_tensor_is_refused(thing: object):
    with pytest.raises(ModaTypeError, match=f"tensor is a {type(thing).__name__}; wanted a tensor"):
        _native.describe("tensor", thing)


def test_a_read_only_array_is_not_written_into():
    tensor, ids = attention_inputs()
    out = np.zeros((1, 2, 5, 4), np.float32)
    out.flags.writeable = False
    given = (tensor, tensor, tensor, ids, None, True, None, None, None, None, "joint", None, "none")
    with pytest.raises(ModaValueError, match="out is read-only"):
        _native.attend_forward(*given, out, torch.empty(1, 2, 1, 5), None, None, 1)
    assert not out.any()


def test_a_wrong_place_to_write_is_refused():
    tensor, ids = attention_inputs()
    given = (tensor, tensor, tensor, ids, None, True, None, None, None, None, "joint", None, "none")
    lse = torch.empty(1, 2, 1, 5)
    with pytest.raises(ModaValueError, match=r"out has shape \(1, 2, 4, 4\); wanted \(1, 2, 5, 4\)"):
        _native.attend_forward(*given, torch.empty(1, 2, 4, 4), lse, None, None, 1)
    with pytest.raises(ModaValueError, match="a contiguous tensor to write into"):
        _native.attend_forward(*given, torch.empty(1, 2, 4, 5).transpose(2, 3), lse, None, None, 1)
    with pytest.raises(ModaTypeError, match="out has dtype float64; wanted float32"):
        _native.attend_forward(*given, torch.empty(1, 2, 5, 4).double(), lse, None, None, 1)


def test_an_error_of_the_producer_passes_through():
    class Broken:
        def __dlpack__(self, **_):
            raise BufferError("not today")

    class Confused:
        def __dlpack__(self, **_):
            return "no capsule"

    with pytest.raises(BufferError, match="not today"):
        _native.describe("tensor", Broken())
    with pytest.raises(ValueError, match="PyCapsule"):
        _native.describe("tensor", Confused())


# The structs as C sees them, to play a producer whose every field can be wrong.


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    pass


class ManagedVersioned(ctypes.Structure):
    pass


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
Managed._fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]
ManagedVersioned._fields_ = [
    ("major", ctypes.c_uint32),
    ("minor", ctypes.c_uint32),
    ("context", ctypes.c_void_p),
    ("deleter", DELETER),
    ("flags", ctypes.c_uint64),
    ("tensor", DLTensor),
]

new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
is_valid = ctypes.pythonapi.PyCapsule_IsValid
is_valid.restype, is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]


class Handmade:
    """A producer of six float32 numbers that counts how often its deleter is called."""

    def __init__(self, versioned: bool, version: tuple[int, int] = (1, 0), **fields: object):
        self.numbers = (ctypes.c_float * 6)(*range(6))
        self.shape, self.strides = (ctypes.c_int64 * 2)(2, 3), (ctypes.c_int64 * 2)(3, 1)
        self.deleted = 0
        self.deleter = DELETER(self.count)
        self.managed = (ManagedVersioned if versioned else Managed)()
        self.managed.deleter = self.deleter
        if versioned:
            self.managed.major, self.managed.minor = version
        tensor = self.managed.tensor
        tensor.data = ctypes.addressof(self.numbers)
        tensor.device_type, tensor.ndim, tensor.code, tensor.bits, tensor.lanes = 1, 2, 2, 32, 1
        tensor.shape = ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64))
        for name, value in fields.items():
            setattr(tensor, name, value)
        self.name = b"dltensor_versioned" if versioned else b"dltensor"
        self.capsule = new_capsule(ctypes.addressof(self.managed), self.name, None)

    def count(self, _):
        self.deleted += 1

    def __dlpack__(self, max_version=None):
        return self.capsule


@pytest.mark.parametrize("versioned", [False, True])
def test_a_taken_tensor_is_deleted_once(versioned: bool):
    producer = Handmade(versioned)
    address = ctypes.addressof(producer.numbers)
    assert _native.describe("tensor", producer) == ((2, 3), "float32", address)
    assert producer.deleted == 1
    assert is_valid(producer.capsule, b"used_" + producer.name)
    with pytest.raises(ValueError, match="PyCapsule"):
        _native.describe("tensor", producer)
    assert producer.deleted == 1


@pytest.mark.parametrize("versioned", [False, True])
def test_a_refused_tensor_is_deleted_once_too(versioned: bool):
    producer = Handmade(versioned, lanes=4)
    with pytest.raises(ModaTypeError, match="float32 in vectors of 4"):
        _native.describe("tensor", producer)
    assert producer.deleted == 1


def test_a_null_deleter_is_no_deleter():
    producer = Handmade(True)
    producer.managed.deleter = DELETER(0)
    assert _native.describe("tensor", producer)[0] == (2, 3)


def test_another_major_version_is_deleted_unread():
    producer = Handmade(True, version=(2, 0))
    with pytest.raises(BufferError, match=r"version 2\.0"):
        _native.describe("tensor", producer)
    assert producer.deleted == 1


def test_byte_offset_and_missing_strides():
    producer = Handmade(False, byte_offset=8)
    producer.shape[:] = 2, 2
    producer.managed.tensor.strides = None
    assert _native.describe("tensor", producer) == ((2, 2), "float32", ctypes.addressof(producer.numbers) + 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": None}, "without data"),
        ({"data": None, "byte_offset": 64}, "without data"),
        ({"byte_offset": 2}, "not aligned"),
        ({"ndim": -1}, "-1 dimensions"),
        ({"ndim": 1000}, "1000 dimensions"),
        ({"shape": None}, "without a shape"),
        ({"device_type": 2}, "device cuda:0"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, object], message: str):
    producer = Handmade(True, **fields)
    with pytest.raises(ModaValueError, match=message):
        _native.describe("tensor", producer)
    assert producer.deleted == 1


@pytest.mark.parametrize("shape", [(-1, 3), (2**62, 2**62)])
def test_an_impossible_shape_is_refused(shape: tuple[int, int]):
    producer = Handmade(True)
    producer.shape[:] = shape
    with pytest.raises(ModaValueError, match="sizes >= 0 whose product fits in memory"):
        _native.describe("tensor", producer)


def test_pinned_memory_is_plain_memory():
    assert _native.describe("tensor", Handmade(True, device_type=3))[0] == (2, 3)


# Our own tensors on their way out.


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_an_own_tensor_is_taken_over_without_a_copy(dtype: str):
    own = _native.Tensor.zeros((2, 3), dtype)
    assert own._holders == 1
    taken = torch.from_dlpack(own)
    assert (tuple(taken.shape), str(taken.dtype)) == ((2, 3), f"torch.{dtype}")
    assert taken.data_ptr() == _native.describe("tensor", own)[2]
    taken.fill_(7)
    assert torch.equal(torch.from_dlpack(own), taken)
    assert own._holders == 2
    del taken
    gc.collect()
    assert own._holders == 1


def test_the_memory_outlives_the_object_that_lent_it():
    own = _native.Tensor.zeros((1000,), "float64")
    array = np.from_dlpack(own)
    del own
    gc.collect()
    assert not array.any()


@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (1, 3)])
def test_a_capsule_that_nobody_takes_lets_go(max_version: tuple[int, int] | None):
    own = _native.Tensor.zeros((2,), "float32")
    capsule = own.__dlpack__(max_version=max_version)
    versioned = max_version is not None and max_version[0] >= 1
    assert is_valid(capsule, b"dltensor_versioned" if versioned else b"dltensor")
    assert own._holders == 2
    del capsule
    assert own._holders == 1


def test_what_an_own_tensor_cannot_do_it_refuses():
    own = _native.Tensor.zeros((2,), "float32")
    for wish in ({"stream": 3}, {"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            own.__dlpack__(**wish)
    assert own._holders == 1
    assert own.__dlpack_device__() == (1, 0)
    with pytest.raises(ModaTypeError, match="int64"):
        _native.Tensor.zeros((2,), "int64")


def test_memory_that_is_not_to_be_had_raises():
    with pytest.raises(ModaMemoryError, match="could not allocate"):
        _native.Tensor.zeros((2**50,), "float64")
    with pytest.raises(ModaValueError, match="fits in memory"):
        _native.Tensor.zeros((2**40, 2**40), "float64")


def test_the_operators_for_any_library():
    tensor, ids = attention_inputs()
    tensor = tensor.bfloat16()
    out, mass = dlpack.modular_attention(NewProducer(tensor), tensor, OldProducer(tensor), ids, return_mass=True)
    wanted, wanted_mass = F.modular_attention(tensor, tensor, tensor, ids, return_mass=True)
    assert torch.equal(torch.from_dlpack(out), wanted)
    assert torch.equal(torch.from_dlpack(mass), wanted_mass)
    eye = torch.eye(4).expand(2, 4, 4)
    aligned, basis = dlpack.duplex_align(tensor, tensor, ids, eye, eye)
    wanted, wanted_basis = F.duplex_align(tensor, tensor, ids, eye, eye)
    assert torch.equal(torch.from_dlpack(aligned), wanted)
    assert torch.equal(torch.from_dlpack(basis), wanted_basis)
    again, same = dlpack.duplex_align(tensor, tensor, ids, eye, eye, basis=basis)
    assert same is basis
    assert torch.equal(torch.from_dlpack(again), wanted)
    decay = torch.ones(1, 2)
    sink = dlpack.pseudo_sink(ids, ids, 9, decay, decay)
    assert torch.equal(torch.from_dlpack(sink), F.pseudo_sink(ids, ids, 9, decay, decay))
