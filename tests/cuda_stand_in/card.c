/* See card.h. Linked into every library of the stand-in that asks for the card. */
#define _GNU_SOURCE
#include "card.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define GIB_PART(gib) ((size_t)((gib) * 1073741824.0))

/* Memory as torch reports it on such cards (messages of out-of-memory errors that people posted); the rest from the
 * tables of compute capabilities in the CUDA programming guide and the data sheets. */
static const Card CARDS[] = {
    {"T4", "Tesla T4", GIB_PART(14.56), 7, 5, 40, 1024, 64 << 10, 64 << 10, 4 << 20, 256, 70},
    {"RTX 3090", "NVIDIA GeForce RTX 3090", GIB_PART(23.69), 8, 6, 82, 1536, 100 << 10, 99 << 10, 6 << 20, 384, 350},
    {"RTX 4090", "NVIDIA GeForce RTX 4090", GIB_PART(23.65), 8, 9, 128, 1536, 100 << 10, 99 << 10, 72 << 20, 384, 450},
    {"A100", "NVIDIA A100-SXM4-80GB", GIB_PART(79.15), 8, 0, 108, 2048, 164 << 10, 163 << 10, 40 << 20, 5120, 400},
    {"H100", "NVIDIA H100 80GB HBM3", GIB_PART(79.10), 9, 0, 132, 2048, 228 << 10, 227 << 10, 50 << 20, 5120, 700},
};

typedef struct {
  pid_t pid;
  size_t bytes;
} Slot;

#define SLOTS 256

const Card *card(void) {
  static Card found;
  if (found.name) return &found;
  const char *wanted = getenv("AUTOTUNE_STAND_IN_CARD"), *memory = getenv("AUTOTUNE_STAND_IN_MEMORY");
  for (size_t i = 0; wanted && i < sizeof CARDS / sizeof *CARDS; i++)
    if (!strcmp(wanted, CARDS[i].name)) {
      Card one = CARDS[i];
      static char full[64];
      snprintf(full, sizeof full, "%s (stand-in)", one.full_name);
      one.full_name = full;
      if (memory) one.memory = strtoull(memory, NULL, 10);
      one.memory -= one.memory % GRANULE;
      found = one;
      return &found;
    }
  fprintf(stderr, "error: AUTOTUNE_STAND_IN_CARD=%s names no card of the stand-in; write one of:", wanted ? wanted : "");
  for (size_t i = 0; i < sizeof CARDS / sizeof *CARDS; i++) fprintf(stderr, " '%s'", CARDS[i].name);
  fprintf(stderr, "\n");
  exit(2);
}

const unsigned char *card_uuid(void) { return (const unsigned char *)"cuda-stand-in-00"; }

/* The shared table, locked until `unlock`. */
static Slot *lock(int *fd) {
  static Slot *table;
  char path[256];
  const char *given = getenv("AUTOTUNE_STAND_IN_STATE");
  if (given) snprintf(path, sizeof path, "%s", given);
  else snprintf(path, sizeof path, "/dev/shm/autotune-cuda-stand-in-%d", (int)getuid());
  *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (*fd < 0 || flock(*fd, LOCK_EX) || ftruncate(*fd, SLOTS * sizeof(Slot))) {
    fprintf(stderr, "error: %s: %s; set AUTOTUNE_STAND_IN_STATE to a file that can be written\n", path, strerror(errno));
    exit(2);
  }
  if (!table) {
    table = mmap(NULL, SLOTS * sizeof(Slot), PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    if (table == MAP_FAILED) abort();
  }
  for (int i = 0; i < SLOTS; i++)
    if (table[i].pid && kill(table[i].pid, 0) && errno == ESRCH) table[i] = (Slot){0};
  return table;
}

static void unlock(int fd) {
  flock(fd, LOCK_UN); /* the mapping would keep the lock of a descriptor that is only closed */
  close(fd);
}

static size_t sum(const Slot *table, pid_t pid) {
  size_t bytes = 0;
  for (int i = 0; i < SLOTS; i++)
    if (!pid || table[i].pid == pid) bytes += table[i].bytes;
  return bytes;
}

size_t card_used(pid_t pid) {
  int fd;
  size_t bytes = sum(lock(&fd), pid);
  unlock(fd);
  return bytes;
}

static Slot *own(Slot *table) {
  for (int i = 0; i < SLOTS; i++)
    if (table[i].pid == getpid()) return &table[i];
  for (int i = 0; i < SLOTS; i++)
    if (!table[i].pid) {
      table[i].pid = getpid();
      return &table[i];
    }
  abort(); /* more processes than any test starts */
}

int card_take(size_t bytes) {
  int fd;
  Slot *table = lock(&fd);
  int fits = sum(table, 0) + bytes <= card()->memory;
  if (fits) own(table)->bytes += bytes;
  unlock(fd);
  return fits;
}

void card_give(size_t bytes) {
  int fd;
  Slot *mine = own(lock(&fd));
  mine->bytes -= bytes < mine->bytes ? bytes : mine->bytes;
  unlock(fd);
}

unsigned card_processes(unsigned room, pid_t *pids, size_t *bytes) {
  int fd;
  unsigned count = 0;
  const Slot *table = lock(&fd);
  for (int i = 0; i < SLOTS; i++)
    if (table[i].bytes) {
      if (count < room) pids[count] = table[i].pid, bytes[count] = table[i].bytes;
      count++;
    }
  unlock(fd);
  return count;
}
