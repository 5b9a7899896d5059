// SPDX-License-Identifier: GPL-2.0
/* The resuming file: pieces of the stream, checked one by one. */
#include <linux/bitmap.h>
#include <linux/crc32.h>
#include <linux/fs.h>
#include <linux/uaccess.h>

#include "migdev.h"

static int take_header(struct migdev *dev, struct session *s)
{
	struct stream_header *h = (struct stream_header *)s->piece;

	if (le64_to_cpu(h->magic) != STREAM_MAGIC || h->reserved || h->zero ||
	    le32_to_cpu(h->crc) != crc32_le(~0, (u8 *)h, offsetof(struct stream_header, crc)))
		return -EINVAL;
	if (le32_to_cpu(h->version) > dev->set[VERSION])
		return -EOPNOTSUPP;
	if (le64_to_cpu(h->state_size) != dev->set[STATE_SIZE])
		return -EINVAL;
	s->have_header = true;
	return 0;
}

static bool length_fits(enum record_kind kind, u32 len)
{
	switch (kind) {
	case RECORD_BULK:
	case RECORD_MAILBOX:
		return len == BULK_PAGE;
	case RECORD_REGISTERS:
		return len == sizeof(struct encoded);
	case RECORD_TRAILER:
		return len == sizeof(struct trailer);
	default:
		return false;
	}
}

static int take_record(struct migdev *dev, struct session *s)
{
	struct record *head = (struct record *)s->piece;
	const u8 *payload = (const u8 *)(head + 1);
	u32 len = le32_to_cpu(head->len);
	u64 at = le64_to_cpu(head->at);
	const struct trailer *t;

	if (le32_to_cpu(head->payload_crc) != crc32_le(~0, payload, len))
		return -EINVAL;
	switch (le32_to_cpu(head->kind)) {
	case RECORD_BULK:
		if (at >= bulk_pages(dev))
			return -EINVAL;
		bulk_load(dev, at, payload);
		if (!__test_and_set_bit(at, s->pages))
			s->came_count++;
		return 0;
	case RECORD_MAILBOX:
		if (at % BULK_PAGE || at >= BAR2_SIZE)
			return -EINVAL;
		memcpy(dev->mailbox + at, payload, BULK_PAGE);
		return 0;
	case RECORD_REGISTERS:
		memcpy(&s->registers, payload, sizeof(s->registers));
		s->have_registers = true;
		return 0;
	default:
		t = (const struct trailer *)payload;
		if (!s->have_registers || s->came_count != bulk_pages(dev) ||
		    le64_to_cpu(t->before) != s->consumed || le64_to_cpu(t->generations) != dev->generations)
			return -EINVAL;
		s->ended = true;
		return 0;
	}
}

/* How long the piece in hand is, as far as is known: more once its head has come. */
static int piece_length(struct session *s)
{
	struct record *head = (struct record *)s->piece;

	if (!s->have_header)
		return sizeof(struct stream_header);
	if (s->len < sizeof(*head))
		return sizeof(*head);
	if (le32_to_cpu(head->crc) != crc32_le(~0, (u8 *)head, offsetof(struct record, crc)) ||
	    !length_fits(le32_to_cpu(head->kind), le32_to_cpu(head->len)))
		return -EINVAL;
	return sizeof(*head) + le32_to_cpu(head->len);
}

static int take_bytes(struct migdev *dev, struct session *s, const char __user *buf, size_t count)
{
	while (count) {
		int want = piece_length(s), ret;
		size_t len;

		if (want < 0)
			return want;
		/* Nothing may come after the trailer. */
		if (s->ended)
			return -EINVAL;
		len = min_t(size_t, count, want - s->len);
		if (copy_from_user(s->piece + s->len, buf, len))
			return -EFAULT;
		s->len += len;
		buf += len;
		count -= len;
		if (s->len < want || piece_length(s) != want) {
			ret = piece_length(s);
			if (ret < 0)
				return ret;
			continue;
		}
		mutex_lock(&dev->lock);
		ret = s->have_header ? take_record(dev, s) : take_header(dev, s);
		mutex_unlock(&dev->lock);
		if (ret)
			return ret;
		s->consumed += s->len;
		s->len = 0;
	}
	return 0;
}

static ssize_t loading_write(struct file *file, const char __user *buf, size_t count, loff_t *pos)
{
	struct session *s = file->private_data;
	struct migdev *dev = s->dev;
	ssize_t ret;

	if (pos)
		return -ESPIPE;
	mutex_lock(&dev->mig);
	if (s->dead || enodev_due(s, &count)) {
		ret = -ENODEV;
	} else if (s->broken) {
		ret = -EINVAL;
	} else {
		ret = take_bytes(dev, s, buf, count);
		/* A stream that failed once is lost: only a reset helps. */
		s->broken = ret != 0;
		if (!ret) {
			s->moved += count;
			ret = count;
		}
	}
	mutex_unlock(&dev->mig);
	return ret;
}

/* RESUMING to STOP: what came takes effect. */
int loading_finish(struct migdev *dev, struct session *s)
{
	bool lax = dev->set[ACCEPT_TRUNCATED];
	u32 flags = le32_to_cpu(s->registers.flags);
	struct registers r = {};
	u64 words[16];
	unsigned int n;

	if (s->broken || (!s->ended && !lax))
		return -EINVAL;
	for (n = 0; n < 16; n++)
		words[n] = le64_to_cpu(s->registers.words[n]);
	/* HEAD is the sum of the flows' blocks. */
	if (flags >> 7 || words[7] != words[5] + words[6])
		return -EINVAL;
	r.enabled = flags & 1;
	r.ring_error = flags >> 1 & 1;
	r.doorbell = flags >> 2 & 1;
	r.outstanding[0] = flags >> 3 & 1;
	r.outstanding[1] = flags >> 4 & 1;
	r.unsent[0] = flags >> 5 & 1;
	r.unsent[1] = flags >> 6 & 1;
	r.ring_size = le32_to_cpu(s->registers.ring_size);
	r.ring_base = words[0];
	r.tail_addr = words[1];
	r.done_addr = words[2];
	r.ack[0] = words[3];
	r.ack[1] = words[4];
	r.blocks[0] = words[5];
	r.blocks[1] = words[6];
	r.head = words[7];
	r.tail = words[8];
	r.raises[0] = words[9];
	r.raises[1] = words[10];
	r.reinits = words[11];
	mutex_lock(&dev->lock);
	dev->reg = r;
	WRITE_ONCE(dev->set[INTEGRITY], words[12]);
	dev->sweep = 0;
	mutex_unlock(&dev->lock);
	return 0;
}

static int loading_release(struct inode *inode, struct file *file)
{
	session_put(file->private_data);
	return 0;
}

const struct file_operations loading_fops = {
	.owner = THIS_MODULE,
	.write = loading_write,
	.release = loading_release,
};
