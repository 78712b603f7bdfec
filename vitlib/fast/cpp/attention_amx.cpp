// Attention in bfloat16 by the tiles of AMX.
//
// Lengths are rounded up to whole tiles, and what is added is zero.

namespace {

inline __m512i load_row(const bfloat16* row, bool exists, __mmask32 mask) {
  return exists ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_setzero_si512();
}

class AmxKernel {
 public:
  using Number = bfloat16;
  static constexpr at::ScalarType kDtype = at::kBFloat16;

  AmxKernel(int64_t tokens, int64_t width)
      : tokens_(tokens), width_(width), padded_(round_up(tokens, kStep)),
        chunks_(round_up(width, kStep) / kStep), full_(chunks_ * kStep),
        arena_(2 * (2 * padded_ * full_ + kQueries * (full_ + padded_)) +
               4 * kQueries * (padded_ + full_ + 1)),
        keys_(arena_.take<bfloat16>(padded_ * full_)),
        values_(arena_.take<bfloat16>(padded_ * full_)),
        queries_(arena_.take<bfloat16>(kQueries * full_)),
        weights_(arena_.take<bfloat16>(kQueries * padded_)),
        scores_(arena_.take<float>(kQueries * padded_)),
        sums_(arena_.take<float>(kQueries * full_)),
        inverse_(arena_.take<float>(kQueries)) {}

  void pack(const bfloat16* keys, int64_t key_row, const bfloat16* values, int64_t value_row) {
    pack_keys(keys, key_row);
    pack_values(values, value_row);
  }

  void attend(const bfloat16* queries, int64_t row, int64_t count, bfloat16* out, int64_t out_row) {
    copy_queries(queries, row, count);
    if (count > kRows) {
      attend_rows<true>(count);
    } else {
      attend_rows<false>(count);
    }
    write_outputs(count, out, out_row);
  }

 private:
  __mmask32 mask(int64_t chunk) const { return first_lanes(width_ - chunk * kStep); }

  // Tiles of 16 keys and one chunk of the width: a row holds a pair of numbers of each key.
  void pack_keys(const bfloat16* keys, int64_t row) {
    bfloat16* tile = keys_;
    for (int64_t j = 0; j < padded_; j += kRows) {
      for (int64_t c = 0; c < chunks_; ++c, tile += kTile) {
        __m512i rows[kRows];
        for (int64_t i = 0; i < kRows; ++i)
          rows[i] = load_row(keys + (j + i) * row + c * kStep, j + i < tokens_, mask(c));
        transpose(rows);
        for (int64_t i = 0; i < kRows; ++i) _mm512_store_si512(tile + i * kStep, rows[i]);
      }
    }
  }

  // Tiles of 32 tokens and 16 numbers of the width: a row holds each number of a pair of tokens.
  void pack_values(const bfloat16* values, int64_t row) {
    alignas(64) uint16_t first[32], second[32];
    for (int i = 0; i < 32; ++i) {
      first[i] = i / 2 + i % 2 * 32;
      second[i] = first[i] + 16;
    }
    const __m512i low = _mm512_load_si512(first), high = _mm512_load_si512(second);
    bfloat16* tile = values_;
    for (int64_t j = 0; j < padded_; j += kStep) {
      for (int64_t c = 0; c < chunks_; ++c, tile += 2 * kTile) {
        for (int64_t i = 0; i < kRows; ++i) {
          const int64_t token = j + 2 * i;
          const bfloat16* const from = values + token * row + c * kStep;
          const __m512i a = load_row(from, token < tokens_, mask(c));
          const __m512i b = load_row(from + row, token + 1 < tokens_, mask(c));
          _mm512_store_si512(tile + i * kStep, _mm512_permutex2var_epi16(a, low, b));
          _mm512_store_si512(tile + kTile + i * kStep, _mm512_permutex2var_epi16(a, high, b));
        }
      }
    }
  }

  void copy_queries(const bfloat16* queries, int64_t row, int64_t count) {
    bfloat16* to = queries_;
    for (int64_t i = 0; i < kQueries; ++i)
      for (int64_t c = 0; c < chunks_; ++c, to += kStep)
        _mm512_store_si512(to, load_row(queries + i * row + c * kStep, i < count, mask(c)));
  }

  // 32 queries, or 16.
  template <bool kBoth>
  void attend_rows(int64_t count) {
    finish_stores();
    for (int64_t j = 0; j < padded_; j += kStep) {
      clear_tiles();
      for (int64_t c = 0; c < chunks_; ++c)
        multiply_tiles<kBoth>(queries_ + c * kStep, full_, keys_ + j * full_ + c * kTile,
                              keys_ + (j + kRows) * full_ + c * kTile);
      store_tiles<kBoth>(scores_ + j, padded_);
    }
    for (int64_t i = 0; i < count; ++i)
      inverse_[i] = 1.0f / compute_weights(scores_ + i * padded_, weights_ + i * padded_);
    finish_stores();
    for (int64_t c = 0; c < chunks_; ++c) {
      clear_tiles();
      for (int64_t j = 0; j < padded_; j += kStep)
        multiply_tiles<kBoth>(weights_ + j, padded_, values_ + j * full_ + 2 * c * kTile,
                              values_ + j * full_ + (2 * c + 1) * kTile);
      store_tiles<kBoth>(sums_ + c * kStep, full_);
    }
  }

  // Write the weights of a row of scores, and return their sum.
  float compute_weights(const float* scores, bfloat16* weights) const {
    const int64_t whole = tokens_ / kStep * kStep;
    const uint32_t rest = first_lanes(tokens_ - whole);
    const __m512 log2e = _mm512_set1_ps(kLog2E);
    const __m512 largest = _mm512_set1_ps(largest_score(scores, tokens_));
    __m512 sum = _mm512_setzero_ps(), other = sum;
    const auto weigh = [&](int64_t j, __mmask16 first, __mmask16 second) {
      const __m512 x = _mm512_sub_ps(_mm512_load_ps(scores + j), largest);
      const __m512 y = _mm512_sub_ps(_mm512_load_ps(scores + j + kLanes), largest);
      const __m512 u = _mm512_maskz_mov_ps(first, exp2(_mm512_mul_ps(x, log2e)));
      const __m512 v = _mm512_maskz_mov_ps(second, exp2(_mm512_mul_ps(y, log2e)));
      sum = _mm512_add_ps(sum, u);
      other = _mm512_add_ps(other, v);
      _mm512_store_si512(weights + j, round_to_bfloat16(u, v));
    };
    for (int64_t j = 0; j < whole; j += kStep) weigh(j, 0xffff, 0xffff);
    if (rest) weigh(whole, rest & 0xffff, rest >> 16);
    return _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
  }

  void write_outputs(int64_t count, bfloat16* out, int64_t row) const {
    const float* sums = sums_;
    for (int64_t i = 0; i < count; ++i, out += row) {
      const __m512 inverse = _mm512_set1_ps(inverse_[i]);
      for (int64_t c = 0; c < chunks_; ++c, sums += kStep) {
        const __m512 a = _mm512_mul_ps(inverse, _mm512_load_ps(sums));
        const __m512 b = _mm512_mul_ps(inverse, _mm512_load_ps(sums + kLanes));
        _mm512_mask_storeu_epi16(out + c * kStep, mask(c), round_to_bfloat16(a, b));
      }
    }
  }

  const int64_t tokens_, width_, padded_, chunks_, full_;  // T, K; T rounded up, K in chunks
  Arena arena_;
  bfloat16 *const keys_, *const values_, *const queries_, *const weights_;
  float *const scores_, *const sums_, *const inverse_;
  const Tiles tiles_;
};

at::Tensor attend_by_amx(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  static const bool has_amx = at::cpu::init_amx();
  TORCH_CHECK(has_amx, "this process may not use AMX");
  return attend<AmxKernel>(q, k, v);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vitlib, library) {
  library.def("attention_amx(Tensor q, Tensor k, Tensor v) -> Tensor");
}

TORCH_LIBRARY_IMPL(vitlib, CPU, library) { library.impl("attention_amx", attend_by_amx); }
