/* Products of bf16 matrices of which one is thin (a rank, a bottleneck's width), sums in fp32.

   Any of m, k and n may be the thin side; only a thin a may be copied. */

#include "thin_product.h"
#include "thin_tiles.h"

#define BLOCK 256        /* pairs of k that columns are packed and multiplied for at a time */
#define HELD (256 << 10) /* bytes of packed columns, and of sums: each a quarter of a cache */
#define FEW_ROWS 128     /* up to here they stay in the caches while columns pass by */

#if HAS_THIN_TILES

const int artemis_has_thin_product = 1;

/* line[k] = a row whose numbers lie side by side; one zero more where k is odd. */
static void copy_row(const Matrix *a, int64_t row, int64_t k, uint16_t *line) {
    for (int64_t c = 0; c < k; c += 16) {
        __mmask16 within = first_of(k - c);
        _mm256_mask_storeu_epi16(line + c, within,
                                 _mm512_cvtepi32_epi16(numbers_of(a, within, row, c)));
    }
    if (k % 2) line[k] = 0;
}

/* copy[pair][m] of a matrix whose columns lie side by side; by all threads of a team. */
static void copy_columns(const Matrix *a, int64_t m, int64_t k, uint32_t *copy) {
    Matrix across = {a->data, a->column, a->row, a->held};
    _Pragma("omp for schedule(static)")
    for (int64_t p = 0; p < (k + 1) / 2; ++p)
        for (int64_t i = 0; i < m; i += 16) {
            __mmask16 within = first_of(m - i);
            __m512i even = numbers_of(&across, within, 2 * p, i), odd = {0};
            if (2 * p + 1 < k) odd = numbers_of(&across, within, 2 * p + 1, i);
            _mm512_mask_storeu_epi32(copy + p * m + i, within, paired(even, odd));
        }
}

/* The same for rows that become bf16 a tile at a time. */
static void block_of_converted(const Matrix *a, const uint32_t *panels, int64_t k, int64_t from,
                               int64_t until, int64_t n, const Output *to) {
    int64_t pairs = (k + 1) / 2;
    uint16_t *lines = malloc(sizeof(uint32_t) * (size_t)(TILE_ROWS * pairs));
    for (int64_t top = from; top < until; top += TILE_ROWS) {
        int64_t stop = until - top < TILE_ROWS ? until : top + TILE_ROWS;
        for (int64_t i = top; i < stop; ++i) copy_row(a, i, k, lines + (i - top) * 2 * pairs);
        Rows rows = {(const uint8_t *)lines - top * 4 * pairs, 4 * pairs, 4, pairs, 0};
        block(&rows, panels, k, top, stop, n, to);
    }
    free(lines);
}

typedef struct {
    Matrix a, b;
    Output to;
    int64_t m, k, n, pairs, panels;
    int by_rows; /* whether the numbers of a row of a lie side by side, */
    Rows rows;   /* and a as the tiles read it: itself, or */
    uint32_t *copy;
    int threads;
} Product;

/* All rows by panels `first` to `last`, a block of k after the other: b is read in pieces as long as
   these panels are wide, and what the next block reads is asked for meanwhile. */
static void columns(const Product *of, int64_t first, int64_t last, uint32_t *packed, Tile *tiles) {
    int64_t of_a_panel = (of->m + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t from = 0; from < of->pairs; from += BLOCK) {
        int64_t until = from + BLOCK < of->pairs ? from + BLOCK : of->pairs;
        Rows rows = of->rows;
        rows.odd = rows.odd && until == of->pairs;
        rows.pairs = until - from - rows.odd;
        pack(&of->b, of->k, of->n, first, last, from, until, packed);
        for (int64_t p = first; p < last; ++p) {
            const uint32_t *panel = packed + (p - first) * (until - from) * PANEL;
            int64_t left = of->n - p * PANEL, width = left < PANEL ? left : PANEL;
            for (int64_t t = 0; t < of_a_panel; ++t) {
                Tile *tile = tiles + (p - first) * of_a_panel + t;
                int64_t top = t * TILE_ROWS, below = of->m - top;
                int64_t count = below < TILE_ROWS ? below : TILE_ROWS;
                if (of->b.column == 1)
                    for (int64_t i = t * 2 * BLOCK / of_a_panel;
                         i < (t + 1) * 2 * BLOCK / of_a_panel && 2 * until + i < of->k; ++i)
                        prefetch(&of->b, 2 * until + i, p * PANEL);
                multiply(&rows, top, count, from, width, panel, tile, from > 0);
                if (until == of->pairs)
                    finish(&of->to, tile, top, count, p * PANEL, width);
            }
        }
    }
}

/* Threads share out the columns, each packing what it multiplies next. */
static void share_columns(const Product *of) {
    int64_t of_a_panel = (of->m + TILE_ROWS - 1) / TILE_ROWS * (int64_t)sizeof(Tile);
    int64_t of_a_block = BLOCK * PANEL * (int64_t)sizeof(uint32_t);
    int64_t most = HELD / (of_a_panel > of_a_block ? of_a_panel : of_a_block);
    int64_t tasks = (of->panels + most - 1) / most;
    tasks = (tasks + of->threads - 1) / of->threads * of->threads;
    _Pragma("omp parallel num_threads(of->threads) if (of->m * of->k * of->n > 65536)")
    {
        int64_t panels = of->panels / tasks + 1;
        int64_t pairs = of->pairs < BLOCK ? of->pairs : BLOCK;
        uint32_t *packed = room_for(panels * pairs * PANEL * (int64_t)sizeof *packed);
        Tile *tiles = room_for(panels * of_a_panel);
        if (!of->by_rows)
            copy_columns(&of->a, of->m, of->k, of->copy);
        else if (of->copy)
            _Pragma("omp for schedule(static)")
            for (int64_t i = 0; i < of->m; ++i)
                copy_row(&of->a, i, of->k, (uint16_t *)(of->copy + i * of->pairs));
        _Pragma("omp for schedule(static)")
        for (int64_t task = 0; task < tasks; ++task)
            columns(of, task * of->panels / tasks, (task + 1) * of->panels / tasks, packed, tiles);
        free(tiles);
        free(packed);
    }
}

/* All of b is packed first; then threads share out the rows. */
static void share_rows(const Product *of) {
    uint32_t *packed = room_for_panels(of->k, of->n);
    int64_t blocks = (of->m + TILE_ROWS - 1) / TILE_ROWS;
    int converts = of->by_rows && of->a.held != BF16;
    _Pragma("omp parallel num_threads(of->threads) if (of->m * of->k * of->n > 65536)")
    {
        if (!of->by_rows) copy_columns(&of->a, of->m, of->k, of->copy);
        pack_all(&of->b, of->k, of->n, of->threads, packed);
        _Pragma("omp for schedule(static)")
        for (int64_t t = 0; t < of->threads; ++t) {
            int64_t from = t * blocks / of->threads * TILE_ROWS;
            int64_t until = (t + 1) * blocks / of->threads * TILE_ROWS;
            until = until < of->m ? until : of->m;
            if (converts)
                block_of_converted(&of->a, packed, of->k, from, until, of->n, &of->to);
            else
                block(&of->rows, packed, of->k, from, until, of->n, &of->to);
        }
    }
    free(packed);
}

/* Every sum is one thread's, in one order. */
void artemis_thin_product(const void *a, int64_t a_row, int64_t a_column, int a_held,
                          const void *b, int64_t b_row, int64_t b_column, int b_held,
                          const uint16_t *start, int64_t start_row, const float *bias, float alpha,
                          void *y, int64_t y_row, float *last, int kind, int64_t m, int64_t k,
                          int64_t n, int threads) {
    Product of = {.a = {a, a_row, a_column, a_held},
                  .b = {b, b_row, b_column, b_held},
                  .to = {kind, start, start_row, bias, alpha, y, y_row, last, m - (last != NULL)},
                  .m = m, .k = k, .n = n, .pairs = (k + 1) / 2, .panels = (n + PANEL - 1) / PANEL,
                  .by_rows = a_column == 1, .threads = threads};
    int few = (m < k && m < n) || (m <= FEW_ROWS && of.panels >= threads);
    of.rows = (Rows){a, 2 * a_row, 4, k / 2, k % 2};
    if (!of.by_rows || (few && a_held != BF16)) {
        of.copy = malloc(sizeof(uint32_t) * (size_t)(m * of.pairs));
        of.rows = of.by_rows ? (Rows){(const uint8_t *)of.copy, 4 * of.pairs, 4, of.pairs, 0}
                             : (Rows){(const uint8_t *)of.copy, 4, 4 * m, of.pairs, 0};
    }
    (few ? share_columns : share_rows)(&of);
    free(of.copy);
}

#else
const int artemis_has_thin_product = 0;
#endif
