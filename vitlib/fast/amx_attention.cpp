// Attention in bfloat16 by the tiles of AMX, for programs that are compiled on a CPU that has them.
//
// How data flows: a thread takes 32 queries of one head. Keys and values of that head are first
// packed as AMX reads them, once for all of its queries. The scores of 32 queries with every key
// are float32 and stay in the caches; the softmax of a row reads them twice and writes weights in
// bfloat16, not divided by their sum; the product of these with the values is divided by that sum.
//
// Shapes: B images, H heads, Q queries, T tokens, K the width of a head. A tile is 16 rows of 64
// bytes. Lengths in tiles are rounded up, and what is added is zero.
// Sources: Vaswani et al. 1706.03762; the softmax less its maximum, Milakov and Gimelshein
// 1805.02867.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>

namespace {

using bfloat16 = uint16_t;

constexpr int64_t kRows = 16;             // of a tile
constexpr int64_t kStep = 32;             // bfloat16 numbers in a row of a tile
constexpr int64_t kTile = kRows * kStep;  // bfloat16 numbers in a tile
constexpr int64_t kQueries = 2 * kRows;   // of a block
constexpr float kLog2E = 1.44269504f;

// A matrix for each image and head, whose rows lie apart.
struct Heads {
  const bfloat16* data;
  int64_t image, head, row;  // strides

  explicit Heads(const at::Tensor& x)
      : data(static_cast<const bfloat16*>(x.const_data_ptr())),
        image(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}

  const bfloat16* at(int64_t b, int64_t h) const { return data + b * image + h * head; }
};

// The lengths of one call, and the memory of one thread for it.
struct Lengths {
  int64_t tokens, width;   // T, K
  int64_t padded, chunks;  // T in whole steps; K in steps

  Lengths(int64_t t, int64_t k)
      : tokens(t), width(k), padded((t + kStep - 1) / kStep * kStep), chunks((k + kStep - 1) / kStep) {}

  // The numbers of a row that lie in a chunk of the width.
  __mmask32 mask(int64_t chunk) const {
    const int64_t left = width - chunk * kStep;
    return left >= kStep ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
  }
};

struct Buffers {
  bfloat16 *keys, *values, *queries, *weights;
  float *scores, *sums, *inverse;

  explicit Buffers(const Lengths& n) {
    const int64_t width = n.chunks * kStep;
    const int64_t narrow = 2 * n.padded * width + kQueries * (width + n.padded);
    const int64_t wide = kQueries * (n.padded + width + 1);
    const int64_t bytes = narrow * sizeof(bfloat16) + wide * sizeof(float);
    memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    TORCH_CHECK(memory_ != nullptr, "no memory for attention");
    keys = static_cast<bfloat16*>(memory_.get());
    values = keys + n.padded * width;
    queries = values + n.padded * width;
    weights = queries + kQueries * width;
    scores = reinterpret_cast<float*>(weights + kQueries * n.padded);
    sums = scores + kQueries * n.padded;
    inverse = sums + kQueries * width;
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

// The tiles of this thread, 8 of full size, until the end of a scope.
struct Tiles {
  Tiles() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = kStep * sizeof(bfloat16);
      config.rows[i] = kRows;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

inline __m512i load_row(const bfloat16* row, bool exists, __mmask32 mask) {
  return exists ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_setzero_si512();
}

// Transpose 16 x 16 numbers of 32 bits.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Keys (T, K) to tiles of 16 keys and one chunk: a row holds a pair of numbers of each key.
void pack_keys(const bfloat16* keys, int64_t row, const Lengths& n, bfloat16* tiles) {
  for (int64_t j = 0; j < n.padded; j += kRows) {
    for (int64_t c = 0; c < n.chunks; ++c, tiles += kTile) {
      __m512i rows[kRows];
      for (int64_t i = 0; i < kRows; ++i)
        rows[i] = load_row(keys + (j + i) * row + c * kStep, j + i < n.tokens, n.mask(c));
      transpose(rows);
      for (int64_t i = 0; i < kRows; ++i) _mm512_store_si512(tiles + i * kStep, rows[i]);
    }
  }
}

// Values (T, K) to tiles of 32 tokens and 16 numbers: a row holds each number of a pair of tokens.
void pack_values(const bfloat16* values, int64_t row, const Lengths& n, bfloat16* tiles) {
  alignas(64) uint16_t first[32], second[32];
  for (int i = 0; i < 32; ++i) {
    first[i] = i / 2 + i % 2 * 32;
    second[i] = first[i] + 16;
  }
  const __m512i low = _mm512_load_si512(first), high = _mm512_load_si512(second);
  for (int64_t j = 0; j < n.padded; j += kStep) {
    for (int64_t c = 0; c < n.chunks; ++c, tiles += 2 * kTile) {
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t token = j + 2 * i;
        const bfloat16* from = values + token * row + c * kStep;
        const __m512i a = load_row(from, token < n.tokens, n.mask(c));
        const __m512i b = load_row(from + row, token + 1 < n.tokens, n.mask(c));
        _mm512_store_si512(tiles + i * kStep, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(tiles + kTile + i * kStep, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }
}

void copy_queries(const bfloat16* queries, int64_t row, int64_t count, const Lengths& n,
                  bfloat16* to) {
  for (int64_t i = 0; i < kQueries; ++i)
    for (int64_t c = 0; c < n.chunks; ++c, to += kStep)
      _mm512_store_si512(to, load_row(queries + i * row + c * kStep, i < count, n.mask(c)));
}

// The product of tiles 4 (and 5) with tiles 6 and 7 is added to tiles 0 and 1 (2 and 3).
template <bool kBoth>
inline void multiply_tiles(const bfloat16* a, int64_t row, const bfloat16* b, int64_t next) {
  _tile_loadd(4, a, row * sizeof(bfloat16));
  _tile_loadd(6, b, kStep * sizeof(bfloat16));
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b + next, kStep * sizeof(bfloat16));
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kBoth) {
    _tile_loadd(5, a + kRows * row, row * sizeof(bfloat16));
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <bool kBoth>
inline void store_tiles(float* to, int64_t row) {
  _tile_stored(0, to, row * sizeof(float));
  _tile_stored(1, to + kRows, row * sizeof(float));
  if constexpr (kBoth) {
    _tile_stored(2, to + kRows * row, row * sizeof(float));
    _tile_stored(3, to + kRows * row + kRows, row * sizeof(float));
  }
}

// Scores of a block of queries: 32 x T, or 16 x T.
template <bool kBoth>
void compute_scores(const Buffers& m, const Lengths& n) {
  const int64_t width = n.chunks * kStep;
  for (int64_t j = 0; j < n.padded; j += kStep) {
    clear_tiles();
    for (int64_t c = 0; c < n.chunks; ++c)
      multiply_tiles<kBoth>(m.queries + c * kStep, width, m.keys + j * width + c * kTile,
                            n.chunks * kTile);
    store_tiles<kBoth>(m.scores + j, n.padded);
  }
}

// Weighted sums of the values: 32 x K, or 16 x K.
template <bool kBoth>
void sum_values(const Buffers& m, const Lengths& n) {
  const int64_t width = n.chunks * kStep;
  for (int64_t c = 0; c < n.chunks; ++c) {
    clear_tiles();
    for (int64_t j = 0; j < n.padded; j += kStep)
      multiply_tiles<kBoth>(m.weights + j, n.padded, m.values + j * width + 2 * c * kTile, kTile);
    store_tiles<kBoth>(m.sums + c * kStep, width);
  }
}

// 2 to the power of y. A polynomial for the fraction errs by 4e-6; bfloat16 rounds by 2e-3.
inline __m512 exp2(__m512 y) {
  const __m512 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0136764690f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0517448522f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2416003067f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6929668329f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(p, y);  // times 2 to the power of the whole part of y
}

// The softmax of each row of scores. Its weights are not divided by their sum.
void compute_weights(const Buffers& m, const Lengths& n, int64_t count) {
  const int64_t whole = n.tokens / kStep * kStep;
  const uint32_t rest = (uint32_t(1) << (n.tokens - whole)) - 1;
  const __mmask16 first = rest & 0xffff, second = rest >> 16;
  const __m512 log2e = _mm512_set1_ps(kLog2E);
  for (int64_t i = 0; i < count; ++i) {
    const float* s = m.scores + i * n.padded;
    bfloat16* weights = m.weights + i * n.padded;
    __m512 a = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), b = a;
    for (int64_t j = 0; j < whole; j += kStep) {
      a = _mm512_max_ps(a, _mm512_load_ps(s + j));
      b = _mm512_max_ps(b, _mm512_load_ps(s + j + kRows));
    }
    if (rest) {
      a = _mm512_mask_max_ps(a, first, a, _mm512_load_ps(s + whole));
      b = _mm512_mask_max_ps(b, second, b, _mm512_load_ps(s + whole + kRows));
    }
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(a, b)) * kLog2E);
    __m512 sum = _mm512_setzero_ps(), other = sum;
    const auto weigh = [&](int64_t j, __mmask16 left, __mmask16 right) {
      const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(s + j), log2e, largest);
      const __m512 y = _mm512_fmsub_ps(_mm512_load_ps(s + j + kRows), log2e, largest);
      const __m512 u = _mm512_maskz_mov_ps(left, exp2(x)), v = _mm512_maskz_mov_ps(right, exp2(y));
      sum = _mm512_add_ps(sum, u);
      other = _mm512_add_ps(other, v);
      _mm512_store_si512(weights + j, (__m512i)_mm512_cvtne2ps_pbh(v, u));
    };
    for (int64_t j = 0; j < whole; j += kStep) weigh(j, 0xffff, 0xffff);
    if (rest) weigh(whole, first, second);
    m.inverse[i] = 1.0f / _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
  }
}

void write_outputs(const Buffers& m, const Lengths& n, int64_t count, bfloat16* out, int64_t row) {
  const float* sums = m.sums;
  for (int64_t i = 0; i < count; ++i, out += row) {
    const __m512 inverse = _mm512_set1_ps(m.inverse[i]);
    for (int64_t c = 0; c < n.chunks; ++c, sums += kStep) {
      const __m512 a = _mm512_mul_ps(inverse, _mm512_load_ps(sums));
      const __m512 b = _mm512_mul_ps(inverse, _mm512_load_ps(sums + kRows));
      _mm512_mask_storeu_epi16(out + c * kStep, n.mask(c), (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
  }
}

template <bool kBoth>
void attend_block(const Buffers& m, const Lengths& n, int64_t count) {
  compute_scores<kBoth>(m, n);
  compute_weights(m, n, count);
  sum_values<kBoth>(m, n);
}

at::Tensor last_dim_dense(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

// Scaled queries (B, H, Q, K), keys and values (B, H, T, K) -> (B, Q, H K), all bfloat16.
at::Tensor attend(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values) {
  static const bool has_amx = at::cpu::init_amx();
  TORCH_CHECK(has_amx, "this process may not use AMX");
  const at::Tensor q = last_dim_dense(queries), k = last_dim_dense(keys), v = last_dim_dense(values);
  const int64_t images = q.size(0), heads = q.size(1), total = q.size(2), width = q.size(3);
  for (const at::Tensor& x : {q, k, v})
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "attention by AMX is in bfloat16");
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == images && k.size(1) == heads &&
                  k.size(3) == width && k.size(2) > 0,
              "queries ", q.sizes(), " do not fit keys ", k.sizes(), " and values ", v.sizes());
  const at::Tensor out = at::empty({images, total, heads * width}, q.options());
  const Lengths n(k.size(2), width);
  const Heads all_q(q), all_k(k), all_v(v);
  auto* const results = static_cast<bfloat16*>(out.mutable_data_ptr());
  const int64_t blocks = (total + kQueries - 1) / kQueries;
  at::parallel_for(0, images * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffers memory(n);
    const Tiles tiles;
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks, start = task % blocks * kQueries;
      const int64_t b = head / heads, h = head % heads, count = std::min(kQueries, total - start);
      if (packed != head) {
        pack_keys(all_k.at(b, h), all_k.row, n, memory.keys);
        pack_values(all_v.at(b, h), all_v.row, n, memory.values);
        packed = head;
      }
      copy_queries(all_q.at(b, h) + start * all_q.row, all_q.row, count, n, memory.queries);
      if (count > kRows) {
        attend_block<true>(memory, n, count);
      } else {
        attend_block<false>(memory, n, count);
      }
      bfloat16* to = results + (b * total + start) * heads * width + h * width;
      write_outputs(memory, n, count, to, heads * width);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vitlib, library) {
  library.def("amx_attention(Tensor q, Tensor k, Tensor v) -> Tensor");
}

TORCH_LIBRARY_IMPL(vitlib, CPU, library) { library.impl("amx_attention", attend); }
