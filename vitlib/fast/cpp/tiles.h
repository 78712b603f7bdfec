// The tiles of AMX, 16 rows of 64 bytes, and what is computed with them.
//
// Tiles 0 to 3 are sums, 4 and 5 rows of the left matrix, 6 and 7 columns of the right one.

namespace {

using bfloat16 = uint16_t;

constexpr int64_t kRows = 16;             // of a tile
constexpr int64_t kTileRow = 64;          // bytes in a row of a tile
constexpr int64_t kStep = 32;             // bfloat16 numbers in a row of a tile
constexpr int64_t kTile = kRows * kStep;  // bfloat16 numbers in a tile

// What AMX is told of its tiles. It is a constant, as compilers do not see that all of it is read
// (GCC 114098).
struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) constexpr TileConfig kTileConfig{};

// The tiles of this thread, until the end of a scope.
struct Tiles {
  Tiles() { _tile_loadconfig(&kTileConfig); }
  ~Tiles() { _tile_release(); }
};

// Let no store pass: compilers do not see that loads of tiles read memory.
inline void finish_stores() { asm volatile("" ::: "memory"); }

inline __m512i round_to_bfloat16(__m512 first, __m512 second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

inline __m512 widen(__m256i numbers) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
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

inline void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Add the product of two tiles of bfloat16 numbers, or of uint8 by int8, to the sums of one.
#define VITLIB_MULTIPLY(sums, left, right) \
  if constexpr (sizeof(Number) == 1) {     \
    _tile_dpbusd(sums, left, right);       \
  } else {                                 \
    _tile_dpbf16ps(sums, left, right);     \
  }

// Add the product of 32 (or 16) rows with two tiles of columns.
template <bool kBoth, typename Number>
inline void multiply_tiles(const Number* a, int64_t row, const void* b, const void* next) {
  _tile_loadd(4, a, row * sizeof(Number));
  _tile_loadd(6, b, kTileRow);
  VITLIB_MULTIPLY(0, 4, 6)
  _tile_loadd(7, next, kTileRow);
  VITLIB_MULTIPLY(1, 4, 7)
  if constexpr (kBoth) {
    _tile_loadd(5, a + kRows * row, row * sizeof(Number));
    VITLIB_MULTIPLY(2, 5, 6)
    VITLIB_MULTIPLY(3, 5, 7)
  }
}

#undef VITLIB_MULTIPLY

// Read what store_tiles wrote.
template <bool kBoth>
inline void load_tiles(const void* from, int64_t row) {
  const float* const sums = static_cast<const float*>(from);
  _tile_loadd(0, sums, row * sizeof(float));
  _tile_loadd(1, sums + kRows, row * sizeof(float));
  if constexpr (kBoth) {
    _tile_loadd(2, sums + kRows * row, row * sizeof(float));
    _tile_loadd(3, sums + kRows * row + kRows, row * sizeof(float));
  }
}

// Write the sums of 32 (or 16) rows, of 32 bits each, to rows that lie `row` numbers apart.
template <bool kBoth>
inline void store_tiles(void* to, int64_t row) {
  float* const sums = static_cast<float*>(to);
  _tile_stored(0, sums, row * sizeof(float));
  _tile_stored(1, sums + kRows, row * sizeof(float));
  if constexpr (kBoth) {
    _tile_stored(2, sums + kRows * row, row * sizeof(float));
    _tile_stored(3, sums + kRows * row + kRows, row * sizeof(float));
  }
}

}  // namespace
