/* The product of thin_product.c, for passes that are made of several. */

#ifndef ARTEMIS_THIN_PRODUCT_H
#define ARTEMIS_THIN_PRODUCT_H

#include <stdint.h>

/* y = start + bias + alpha·a b for a [m, k] and b [k, n], numbered and held as in thin_tiles.h. */
void artemis_thin_product(const void *a, int64_t a_row, int64_t a_column, int a_held,
                          const void *b, int64_t b_row, int64_t b_column, int b_held,
                          const uint16_t *start, int64_t start_row, const float *bias, float alpha,
                          void *y, int64_t y_row, float *last, int kind, int64_t m, int64_t k,
                          int64_t n, int threads);

#endif
