// The kernels of AddLora on a GPU: y += (x·A)·B, in one launch. library.py compiles them with NVRTC.
//
// A block of threads computes x·A, [rank], for itself, though all blocks of a token need the same: it is read from
// the GPU's cache in about the microsecond that a second launch would cost. Then every thread adds to one column.

typedef unsigned short half;  // of 16 bits; written out, as NVRTC would have to find CUDA's headers

__device__ float widen(half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
  return wide;
}

__device__ half narrow(float value) {
  half narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(value));
  return narrow;
}

constexpr int COLUMNS = 256;  // of a block, and its threads; as in add_lora.c
constexpr int TOKENS = 8;     // of a block in a prompt or batch, so that A is read once for all of them
constexpr int EIGHT = 8;      // ranks that a thread reads at once, in 16 bytes
constexpr int EARLY = 16;     // ranks of B that are on their way while x·A is computed

template <int T>
__device__ void add_lora(const half *x, const half *a, const half *b, half *y, long long in, long long out,
                         long long rank, long long tokens) {
  extern __shared__ float low[];  // x·A, [T, rank]
  __shared__ float parts[COLUMNS][EIGHT + 1];
  const int thread = threadIdx.x, groups = rank / EIGHT, step = COLUMNS / groups;
  const int group = thread % groups, first = thread / groups;
  const long long token = (long long)blockIdx.y * T, column = (long long)blockIdx.x * COLUMNS + thread;
  half early[EARLY];
  if (column < out)
#pragma unroll
    for (int j = 0; j < EARLY; j++)
      if (j < rank) early[j] = b[j * out + column];

  float sums[T][EIGHT] = {};
  if (first < step) {
#pragma unroll 4
    for (long long k = first; k < in; k += step) {
      const int4 eight = *reinterpret_cast<const int4 *>(a + k * rank + group * EIGHT);
      const half *row = reinterpret_cast<const half *>(&eight);
      for (int t = 0; t < T; t++) {
        const float value = token + t < tokens ? widen(x[(token + t) * in + k]) : 0.f;
        for (int j = 0; j < EIGHT; j++) sums[t][j] += value * widen(row[j]);
      }
    }
  }
  for (int t = 0; t < T; t++) {
    for (int j = 0; j < EIGHT; j++) parts[thread][j] = sums[t][j];
    __syncthreads();
    for (int j = thread / 32; j < rank; j += COLUMNS / 32) {  // a warp adds up what all threads have of a rank
      float sum = 0;
      for (int i = thread % 32; i < step; i += 32) sum += parts[i * groups + j / EIGHT][j % EIGHT];
      for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane);
      if (thread % 32 == 0) low[t * rank + j] = sum;
    }
    __syncthreads();
  }
  if (column >= out) return;
  float added[T] = {};
#pragma unroll
  for (int j = 0; j < EARLY; j++)
    if (j < rank)
      for (int t = 0; t < T; t++) added[t] += low[t * rank + j] * widen(early[j]);
  for (int j = EARLY; j < rank; j++) {
    const float value = widen(b[j * out + column]);
    for (int t = 0; t < T; t++) added[t] += low[t * rank + j] * value;
  }
  for (int t = 0; t < T && token + t < tokens; t++) {
    half *at = y + (token + t) * out + column;
    *at = narrow(widen(*at) + added[t]);
  }
}

extern "C" __global__ void one_token(const half *x, const half *a, const half *b, half *y, long long in,
                                     long long out, long long rank, long long tokens) {
  add_lora<1>(x, a, b, y, in, out, rank, tokens);
}

extern "C" __global__ void many_tokens(const half *x, const half *a, const half *b, half *y, long long in,
                                       long long out, long long rank, long long tokens) {
  add_lora<TOKENS>(x, a, b, y, in, out, rank, tokens);
}
