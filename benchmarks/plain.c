/* The plainest way to the same files, as a limit to measure against.
 *
 *   plain ARCHIVE TARGET WORKERS buffered|uncached
 *
 * makes TARGET; then WORKERS processes take the inner tars of ARCHIVE from a shared list, largest first. Each reads
 * windows into one buffer and writes the members into TARGET/<inner tar's name>/. No checksum of headers, no digest, no
 * check, no progress, no long names.
 * "uncached" reads with RWF_DONTCACHE (Linux 6.14), so that no page cache is left behind.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define WINDOW (8L << 20)
#define BLOCK 512L
#define MAX_TARS 100000
#ifndef RWF_DONTCACHE
#define RWF_DONTCACHE 0x80
#endif

struct inner { off_t offset, size; char name[101]; };

static struct inner tars[MAX_TARS];
static int tar_count;

static off_t padded(off_t size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

/* Name and size of a header of a regular file; 0 at the end of the archive. */
static int parse(const char *header, char name[101], off_t *size) {
    char octal[13] = {0};
    if (!header[0]) return 0;
    if (header[156] != '0' && header[156] != 0) errx(1, "member type %c is not for this program", header[156]);
    memcpy(name, header, 100);
    name[100] = 0;
    memcpy(octal, header + 124, 12);
    *size = strtoll(octal, NULL, 8);
    return 1;
}

static void read_index(int archive) {
    char header[BLOCK];
    off_t at = 0;
    while (pread(archive, header, BLOCK, at) == BLOCK) {
        struct inner *tar = &tars[tar_count];
        if (!parse(header, tar->name, &tar->size)) return;
        if (++tar_count == MAX_TARS) errx(1, "too many inner tars");
        tar->name[strcspn(tar->name, ".")] = 0;
        tar->offset = at + BLOCK;
        at = tar->offset + padded(tar->size);
    }
    errx(1, "the archive is cut off");
}

static int largest_first(const void *a, const void *b) {
    off_t x = ((const struct inner *)a)->size, y = ((const struct inner *)b)->size;
    return (x < y) - (x > y);
}

static void fill(int archive, char *buffer, long length, off_t offset, int flags) {
    while (length > 0) {
        struct iovec part = {buffer, length};
        ssize_t got = preadv2(archive, &part, 1, offset, flags);
        if (got <= 0) err(1, "read");
        buffer += got, offset += got, length -= got;
    }
}

static void extract(int archive, const struct inner *tar, int target, char *buffer, int flags) {
    char name[101];
    off_t left = 0; /* bytes still to be written to the open file */
    int file = -1;
    if (mkdirat(target, tar->name, 0755)) err(1, "mkdir %s", tar->name);
    int folder = openat(target, tar->name, O_RDONLY | O_DIRECTORY);
    if (folder < 0) err(1, "open %s", tar->name);
    for (off_t done = 0; done < tar->size; done += WINDOW) {
        long length = tar->size - done < WINDOW ? tar->size - done : WINDOW;
        fill(archive, buffer, length, tar->offset + done, flags);
        for (long at = 0; at < length;) {
            if (file < 0) {
                if (!parse(buffer + at, name, &left)) goto end;
                at += BLOCK;
                file = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL, 0644);
                if (file < 0) err(1, "create %s", name);
            }
            long part = left < length - at ? left : length - at;
            if (part && write(file, buffer + at, part) != part) err(1, "write %s", name);
            at += padded(part);
            left -= part;
            if (!left) {
                if (close(file)) err(1, "close %s", name);
                file = -1;
            }
        }
    }
end:
    if (file >= 0) errx(1, "%s is cut off", tar->name);
    close(folder);
}

int main(int argc, char **argv) {
    if (argc != 5) errx(2, "usage: plain ARCHIVE TARGET WORKERS buffered|uncached");
    int flags = strcmp(argv[4], "uncached") ? 0 : RWF_DONTCACHE;
    if (mkdir(argv[2], 0755)) err(1, "mkdir %s", argv[2]);
    int archive = open(argv[1], O_RDONLY), target = open(argv[2], O_RDONLY | O_DIRECTORY);
    if (archive < 0 || target < 0) err(1, "open");
    read_index(archive);
    qsort(tars, tar_count, sizeof *tars, largest_first);
    atomic_int *next = mmap(NULL, sizeof *next, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (next == MAP_FAILED) err(1, "mmap");
    for (int worker = atoi(argv[3]); worker > 0; worker--) {
        pid_t child = fork();
        if (child < 0) err(1, "fork");
        if (child) continue;
        char *buffer = malloc(WINDOW);
        if (!buffer) err(1, "malloc");
        for (int i; (i = atomic_fetch_add(next, 1)) < tar_count;) extract(archive, &tars[i], target, buffer, flags);
        _exit(0);
    }
    int status, failed = 0;
    while (wait(&status) > 0) failed |= status != 0;
    return failed;
}
