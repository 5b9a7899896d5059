/* SPDX-License-Identifier: GPL-2.0 */
/*
 * migdev: a mediated test device that migrates. To a guest it is the project's sample device: one PCI function with a
 * DMA engine fed by a ring, two MSI-X vectors, a mailbox, and internal state that keeps changing.
 */
#ifndef MIGDEV_H
#define MIGDEV_H

#include <linux/eventfd.h>
#include <linux/kref.h>
#include <linux/mdev.h>
#include <linux/mutex.h>
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/xarray.h>

#define VECTORS		2
#define BAR0_SIZE	(16u << 10)
#define BAR2_SIZE	(1u << 20)
#define CONFIG_SIZE	256u
#define BULK_PAGE	4096u
#define MAX_BLOCK	65536u
#define MAX_STATE	(1ull << 30)

/* Numbers behind the sysfs attributes of an instance, in the order of their table in attributes.c. */
enum setting {
	STATE_SIZE, DIRTY_RATE, DMA_INTERVAL_US, VERSION, MIG_FLAGS, DMA_LOG,
	FAIL_ARC, FAIL_ERRNO, ERROR_ARC, ARC_DELAY_MS, SHORT_READ, ENODEV_AFTER, SIZE_PERCENT, PRECOPY_ZERO,
	ACCEPT_TRUNCATED, LOG_OMIT_EVERY, IRQS_POSSIBLE, ARCS, INTEGRITY,
	SETTINGS
};

enum mode { STOPPED, NO_P2P, RUN };

struct registers {
	u64 ring_base, tail_addr, done_addr;
	u64 ack[VECTORS], blocks[VECTORS], raises[VECTORS];
	u64 head, tail, reinits;
	u32 ring_size;
	bool enabled, ring_error, doorbell;
	/* Raised and not acknowledged since. */
	bool outstanding[VECTORS];
	/* Raised while masked or not connected: sent when that ends. */
	bool unsent[VECTORS];
};

/* The registers in a migration stream: little-endian. */
struct encoded {
	__le32 flags, ring_size;
	__le64 words[16];
} __packed;

struct log_range {
	u64 first, last;
};

#define STREAM_MAGIC	0x314154535645444dull	/* "MDEVSTA1" */

struct stream_header {
	__le64 magic;
	__le32 version, reserved;
	__le64 state_size;
	__le32 zero, crc;
} __packed;

enum record_kind { RECORD_BULK = 1, RECORD_MAILBOX, RECORD_REGISTERS, RECORD_TRAILER };

struct record {
	__le32 kind, len;
	__le64 at;
	/* Of the payload; of the 20 bytes before it. */
	__le32 payload_crc, crc;
} __packed;

struct trailer {
	__le64 before, generations;
} __packed;

#define RECORD_PAGE	(sizeof(struct record) + BULK_PAGE)

/* A data stream. The device and the file hold a reference each. */
struct session {
	struct kref kref;
	struct migdev *dev;
	bool saving, dead, broken;
	/* Bytes moved. */
	u64 moved;
	/* The piece in hand. Saving: [at, len) are left to read. Loading: [0, len) have come. */
	u8 piece[RECORD_PAGE];
	u32 at, len;
	/* Saving. */
	bool stopped, header_done, piece_initial, registers_done, trailer_done;
	u64 cursor, mailbox_cursor, made;
	/* Loading. */
	bool have_header, have_registers, ended;
	u64 consumed, came_count;
	struct encoded registers;
	/* Bulk pages: saving, changed since they were sent; loading, those that came. */
	unsigned long *pages;
};

struct migdev {
	struct vfio_device vdev;
	u64 set[SETTINGS];

	/* Outer lock: state, session, arcs, open and settings. */
	struct mutex mig;
	enum vfio_device_mig_state state;
	struct session *session;
	bool open, foreign, struck;

	/*
	 * Inner lock: everything below. The engine holds it for one descriptor, so who has it knows the engine to be
	 * between two.
	 */
	struct mutex lock;
	enum mode mode;
	struct registers reg;
	u8 config[CONFIG_SIZE], writable[CONFIG_SIZE];
	struct eventfd_ctx *events[VECTORS];
	bool masked[VECTORS];
	u8 *mailbox, *bulk, *scratch;
	u64 generations, random, check_cursor, owed, churned;
	/* Next page of the look at everything after a migration; none when it is at the end. */
	u64 sweep;
	unsigned long *damaged;

	struct task_struct *engine;
	wait_queue_head_t wake;
	bool kicked;

	/* The DMA log, under a lock of its own, taken last. */
	struct mutex log_lock;
	bool logging, log_broken;
	unsigned int log_shift, log_count;
	struct log_range *log_ranges;
	struct xarray log;
};

static inline struct migdev *to_migdev(struct vfio_device *vdev)
{
	return container_of(vdev, struct migdev, vdev);
}

static inline u64 bulk_pages(struct migdev *dev)
{
	return dev->set[STATE_SIZE] / BULK_PAGE;
}

/* attributes.c */
extern const struct attribute_group *migdev_groups[];
void migdev_settings_init(struct migdev *dev);

/* front.c */
void front_reset(struct migdev *dev);
ssize_t front_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos);
ssize_t front_write(struct vfio_device *vdev, const char __user *buf, size_t count, loff_t *ppos);
u64 region_size(u32 index);
#define REGION_SHIFT 40

/* interrupts.c */
void interrupt_raise(struct migdev *dev, unsigned int vector);
void interrupt_flush(struct migdev *dev, unsigned int vector);
void interrupts_disconnect(struct migdev *dev);
long interrupts_info(struct migdev *dev, unsigned long arg);
long interrupts_set(struct migdev *dev, unsigned long arg);

/* engine.c */
int engine_start(struct migdev *dev);
void engine_stop(struct migdev *dev);
void engine_kick(struct migdev *dev);
void engine_quiesce(struct migdev *dev);

/* bulk.c */
int bulk_resize(struct migdev *dev, u64 size);
void bulk_renew(struct migdev *dev);
bool bulk_work(struct migdev *dev);
void bulk_check_some(struct migdev *dev, unsigned int count);
void bulk_load(struct migdev *dev, u64 page, const u8 *bytes);
void bulk_free(struct migdev *dev);

/* log.c */
extern const struct vfio_log_ops migdev_log_ops;
void log_mark(struct migdev *dev, u64 iova, u64 len);
void log_end(struct migdev *dev);

/* migrate.c */
extern const struct vfio_migration_ops migdev_mig_ops;

/* session.c */
void session_put(struct session *s);
void session_end(struct migdev *dev);
void session_reset(struct migdev *dev);
bool enodev_due(struct session *s, size_t *count);

/* saving.c */
extern const struct file_operations saving_fops;
u64 saving_left(struct migdev *dev, struct session *s);
void registers_encode(struct migdev *dev, struct encoded *out);

/* loading.c */
extern const struct file_operations loading_fops;
int loading_finish(struct migdev *dev, struct session *s);

#endif
