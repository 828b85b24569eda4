/* The card that is stood in for, and the count of its memory that all processes share. */
#ifndef CARD_H
#define CARD_H
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define DRIVER_VERSION 13000
#define MIB ((size_t)1 << 20)
#define CONTEXT_BYTES (450 * MIB) /* a plausible CUDA context; no measurement */
#define GRANULE (2 * MIB)         /* the driver hands memory out in pages of this size */

typedef struct {
  const char *name; /* as AUTOTUNE_STAND_IN_CARD names it */
  const char *full_name;
  size_t memory;
  int major, minor, multiprocessors, threads_per_multiprocessor;
  size_t shared_per_multiprocessor, shared_per_block_optin, l2;
  int bus_width, watts;
} Card;

const Card *card(void);
const unsigned char *card_uuid(void); /* 16 bytes */

/* Bytes of one process, or of all where pid is 0. Processes that have ended count nothing. */
size_t card_used(pid_t pid);
/* Add bytes to this process's count; 0 where the card has no room for them. */
int card_take(size_t bytes);
void card_give(size_t bytes);
/* At most `room` processes and their bytes; returns how many there are. */
unsigned card_processes(unsigned room, pid_t *pids, size_t *bytes);
#endif
