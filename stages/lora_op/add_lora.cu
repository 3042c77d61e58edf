// The kernels of AddLora on a GPU, y += (x·A)·B. library.py compiles them with NVRTC.
//
// `lower` computes x·A in parts, each by a block of threads from a slice of x, so that many blocks share the reading of
// A; `raise` adds the parts up and multiplies by B. Their sums are of float32.

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

constexpr int THREADS = 256;  // of a block; `raise` gives each a column
constexpr int SLICE = 128;    // of x, for a block of `lower`
constexpr int TOKENS = 8;     // of a block in a prompt or batch, so that what it reads of A and B serves them all
constexpr int EIGHT = 8;      // ranks that a thread of `lower` reads at once, in 16 bytes
constexpr int EARLY = 16;     // ranks of B that `raise` reads while it waits for the parts
// as in add_lora.c: THREADS, SLICE and TOKENS

// low [tokens, slices, rank]: what each slice of x adds to x·A
template <int T>
__device__ void lower(const half *x, const half *a, float *low, int in, int rank, int tokens) {
  __shared__ float parts[THREADS][EIGHT + 1];
  const int thread = threadIdx.x, groups = rank / EIGHT, step = THREADS / groups;
  const int group = thread % groups, slices = gridDim.x, token = blockIdx.y * T;
  const int end = min(in, (int)(blockIdx.x + 1) * SLICE);
  float sums[T][EIGHT] = {};
  if (thread < step * groups)
    for (int k = blockIdx.x * SLICE + thread / groups; k < end; k += step) {
      const int4 eight = *reinterpret_cast<const int4 *>(a + (long long)k * rank + group * EIGHT);
      const half *row = reinterpret_cast<const half *>(&eight);
#pragma unroll
      for (int t = 0; t < T; t++) {
        const float value = token + t < tokens ? widen(x[(long long)(token + t) * in + k]) : 0.f;
#pragma unroll
        for (int j = 0; j < EIGHT; j++) sums[t][j] += value * widen(row[j]);
      }
    }
#pragma unroll
  for (int t = 0; t < T; t++) {
    if (token + t >= tokens) return;  // all threads alike
#pragma unroll
    for (int j = 0; j < EIGHT; j++) parts[thread][j] = sums[t][j];
    __syncthreads();
    for (int j = thread / 32; j < rank; j += THREADS / 32) {  // a warp adds up what all threads have of a rank
      float sum = 0;
      for (int i = thread % 32; i < step; i += 32) sum += parts[i * groups + j / EIGHT][j % EIGHT];
      for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane);
      if (thread % 32 == 0) low[((long long)(token + t) * slices + blockIdx.x) * rank + j] = sum;
    }
    __syncthreads();
  }
}

template <int T>
__device__ void raise(const float *low, const half *b, half *y, int slices, int out, int rank, int tokens) {
  extern __shared__ float sums[];  // x·A, [T, rank]
  const int thread = threadIdx.x, column = blockIdx.x * THREADS + thread, token = blockIdx.y * T;
  half early[EARLY] = {};
  if (column < out) {
#pragma unroll
    for (int j = 0; j < EARLY; j++)
      if (j < rank) early[j] = b[(long long)j * out + column];
  }
  // every eight threads add up the slices of one sum
  for (int i = thread / EIGHT; i < (T * rank + 31) / 32 * 32; i += THREADS / EIGHT) {
    const int t = i / rank, j = i % rank;
    float sum = 0;
    if (i < T * rank && token + t < tokens)
      for (int slice = thread % EIGHT; slice < slices; slice += EIGHT)
        sum += low[((long long)(token + t) * slices + slice) * rank + j];
    for (int lane = EIGHT / 2; lane; lane /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane);
    if (i < T * rank && thread % EIGHT == 0) sums[i] = sum;
  }
  __syncthreads();
  if (column >= out) return;
  float added[T] = {};
#pragma unroll
  for (int j = 0; j < EARLY; j++)
    if (j < rank)
#pragma unroll
      for (int t = 0; t < T; t++) added[t] += sums[t * rank + j] * widen(early[j]);
  for (int j = EARLY; j < rank; j++) {
    const float value = widen(b[(long long)j * out + column]);
#pragma unroll
    for (int t = 0; t < T; t++) added[t] += sums[t * rank + j] * value;
  }
#pragma unroll
  for (int t = 0; t < T; t++)
    if (token + t < tokens) {
      half *at = y + (long long)(token + t) * out + column;
      *at = narrow(widen(*at) + added[t]);
    }
}

extern "C" __global__ void lower_one(const half *x, const half *a, float *low, int in, int rank, int tokens) {
  lower<1>(x, a, low, in, rank, tokens);
}

extern "C" __global__ void lower_many(const half *x, const half *a, float *low, int in, int rank, int tokens) {
  lower<TOKENS>(x, a, low, in, rank, tokens);
}

extern "C" __global__ void raise_one(const float *low, const half *b, half *y, int slices, int out, int rank,
                                     int tokens) {
  raise<1>(low, b, y, slices, out, rank, tokens);
}

extern "C" __global__ void raise_many(const float *low, const half *b, half *y, int slices, int out, int rank,
                                      int tokens) {
  raise<TOKENS>(low, b, y, slices, out, rank, tokens);
}
