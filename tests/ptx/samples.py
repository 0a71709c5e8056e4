"""Small programs that show what the translator does: a kernel in CUDA, and instructions with what comes of them."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
NVCC = ("nvcc", "--options-file", f"{ROOT}/csrc/cuda/nvcc.options", "-arch=compute_90", "-lineinfo", "-ptx")
ONE = 0x3FF0000000000000  # 1.0
NAN = 0x7FF8000000000000
LEAST = 1 << 63

# Groups of four threads add up what they have put in shared memory and what is in global memory, by one function.
SUMS = r"""
struct Args {
  const double* numbers;
  double* sums;
  long long scale;
  unsigned char negative;
};
__device__ __noinline__ double total(const double* numbers, int count) {
  double sum = 0;
#pragma unroll 1
  for (int k = 0; k < count; ++k) sum += numbers[k];
  return sum;
}
__device__ __noinline__ void keep(const Args& args, const double* room, int group) {
  const double sum = total(room, 4) + total(args.numbers + 4 * group, 4);
  args.sums[group] = (args.negative ? -sum : sum) * double(args.scale);
}
extern "C" __global__ void __launch_bounds__(64) sums(const __grid_constant__ Args args) {
  __shared__ double room[64];
  room[63 - threadIdx.x] = args.numbers[63 - threadIdx.x];
  BARRIER;
  if (threadIdx.x % 4 == 0) keep(args, room + threadIdx.x, threadIdx.x / 4);
}
extern "C" __global__ void __launch_bounds__(32) past_the_end(const __grid_constant__ Args args) {
  __shared__ double room[32];
  room[threadIdx.x] = threadIdx.x;
  __syncthreads();
  args.sums[threadIdx.x] = total(room + threadIdx.x, 2);
}
"""

# Statements that write %d0, %d1 is the input, and what %d0 then is. %r and %h have 32 and 16 bits.
RESULTS = [
    ("add.s64 %d0, %d1, -2;", 1, -1),
    ("mul.hi.s64 %d0, %d1, -3;", 1 << 62, -1),
    ("mul.hi.u64 %d0, %d1, -1;", -1, -2),
    ("cvt.u32.u64 %r1, %d1; mul.hi.s32 %r2, %r1, 715827883; cvt.s64.s32 %d0, %r2;", -12, -3),
    ("cvt.u32.u64 %r1, %d1; mul.wide.s32 %d0, %r1, -2;", 1 << 31, 1 << 32),
    ("div.s64 %d0, %d1, -2;", 7, -3),
    ("div.s64 %d0, %d1, -1;", LEAST, LEAST),
    ("rem.s64 %d0, %d1, -2;", -7, -1),
    ("div.u64 %d0, %d1, 2;", -1, LEAST - 1),
    ("cvt.u16.u64 %h1, %d1; div.u16 %h2, %h1, 7; cvt.u64.u16 %d0, %h2;", 0x1FFFF, 9362),
    ("max.s64 %d0, %d1, 1;", -1, 1),
    ("max.u64 %d0, %d1, 1;", -1, -1),
    ("bfi.b64 %d0, %d1, -1, 32, 16;", 5, 0xFFFF0005FFFFFFFF),
    ("bfi.b64 %d0, %d1, 7, 64, 8;", 5, 7),
    ("cvt.u32.u64 %r1, %d1; prmt.b32 %r2, %r1, 0x44332211, 0x1054; cvt.u64.u32 %d0, %r2;", 0xDDCCBBAA, 0xBBAA2211),
    ("cvt.u32.u64 %r1, %d1; prmt.b32 %r2, %r1, 0, 0xB800; cvt.u64.u32 %d0, %r2;", 0x80000001, 0xFF000101),
    ("shr.s64 %d0, %d1, 99;", -5, -1),
    ("shl.b64 %d0, %d1, 64;", -5, 0),
    ("cvt.u32.u64 %r1, %d1; not.b32 %r2, %r1; cvt.u64.u32 %d0, %r2;", 1, 0xFFFFFFFE),
    ("neg.s64 %d0, %d1;", LEAST, LEAST),
    ("rcp.rn.f64 %d0, %d1;", 0x4008000000000000, 0x3FD5555555555555),
    ("div.rn.f64 %d0, 0d3FF0000000000000, %d1;", 0x4008000000000000, 0x3FD5555555555555),
    ("neg.f64 %d0, %d1;", 0, LEAST),
    ("min.f64 %d0, %d1, 0d3FF0000000000000;", NAN, ONE),
    ("max.f64 %d0, %d1, 0d8000000000000000;", 0, 0),
    ("cvt.rn.f32.f64 %r1, %d1; cvt.u64.u32 %d0, %r1;", 0x3FF0000010000000, 0x3F800000),
    ("cvt.rn.f32.f64 %r1, %d1; cvt.u64.u32 %d0, %r1;", 0x3FF0000030000000, 0x3F800002),
    ("cvt.rzi.s64.f64 %d0, %d1;", 0xC00F000000000000, -3),
    ("cvt.rzi.s64.f64 %d0, %d1;", NAN, LEAST),
    ("cvt.rzi.u32.f64 %r1, %d1; cvt.u64.u32 %d0, %r1;", 0xC00F000000000000, 0),
    ("cvt.rmi.f64.f64 %d0, %d1;", 0xBFE0000000000000, 0xBFF0000000000000),
    ("cvt.rn.f64.s64 %d0, %d1;", -1, 0xBFF0000000000000),
    ("cvt.rn.f64.u64 %d0, %d1;", -1, 0x43F0000000000000),
    ("setp.eq.f64 %p1, %d1, %d1; selp.b64 %d0, 1, 2, %p1;", NAN, 2),
    ("setp.leu.f64 %p1, %d1, 0d0000000000000000; selp.b64 %d0, 1, 2, %p1;", NAN, 1),
    ("setp.gt.s64 %p1, %d1, 0; selp.b64 %d0, 1, 2, %p1;", -1, 2),
    ("setp.hi.u64 %p1, %d1, 0; selp.b64 %d0, 1, 2, %p1;", -1, 1),
    ("cvt.u16.u64 %h1, %d1; setp.lt.s16 %p1, %h1, 0; selp.b64 %d0, 1, 2, %p1;", 0x8000, 1),
    ("cvt.u16.u64 %h1, %d1; setp.lt.u16 %p1, %h1, 9; selp.b64 %d0, 1, 2, %p1;", 0x8000, 2),
    ("mov.pred %p2, 0; setp.eq.or.s64 %p1|%p2, %d1, 7, !%p2; selp.b64 %d0, 1, 2, %p2;", 7, 1),
    ("mov.pred %p2, -1; setp.eq.and.s64 %p1, %d1, 7, %p2; @!%p1 mov.u64 %d0, 3; @%p1 mov.u64 %d0, 4;", 7, 4),
    ("mov.b64 {%r1, %r2}, %d1; mov.b64 %d0, {%r2, %r1};", 0x100000002, 0x200000001),
    ("{ .reg .b64 %d2; .reg .pred p; setp.ne.s64 p, %d1, 0; selp.b64 %d2, 5, 6, p; mov.u64 %d0, %d2; }", 1, 5),
    ("mov.u64 %d2, 3; { .reg .b64 %d2; mov.u64 %d2, %d1; } mov.u64 %d0, %d2;", 1, 3),
]


def of_results() -> str:
    """A kernel of one thread. It reads the inputs at one parameter, and writes what comes of them at the other."""
    parts = [
        f"ld.global.u64 %d1, [%in + {8 * k}]; {statements} st.global.u64 [%out + {8 * k}], %d0;"
        for k, (statements, _, _) in enumerate(RESULTS)
    ]
    registers = ".reg .b64 %d<3>; .reg .b64 %in, %out; .reg .b32 %r<3>; .reg .b16 %h<3>; .reg .pred %p<3>;"
    given = "ld.param.u64 %in, [a]; ld.param.u64 %out, [b];"
    text = "\n".join([registers, given, *parts, "ret;"])
    return f".visible .entry results(\n.param .u64 a,\n.param .u64 b\n)\n.reqntid 1\n{{\n{text}\n}}\n"


def compiled(source: Path, to: Path, *options: str) -> str:
    """The PTX that nvcc makes of a file."""
    subprocess.run([*NVCC, *options, str(source), "-o", str(to)], check=True)
    return to.read_text()


def kernels(ptx: str) -> list[str]:
    """The names of the kernels of a module."""
    return re.findall(r"\.entry\s+(\w+)", ptx)
