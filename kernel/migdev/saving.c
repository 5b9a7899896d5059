// SPDX-License-Identifier: GPL-2.0
/* The saving file: pieces of the stream, made as they are read. */
#include <linux/bitmap.h>
#include <linux/crc32.h>
#include <linux/fs.h>
#include <linux/uaccess.h>

#include "migdev.h"

static bool mailbox_used(struct migdev *dev, u64 page)
{
	return memchr_inv(dev->mailbox + page * BULK_PAGE, 0, BULK_PAGE);
}

void registers_encode(struct migdev *dev, struct encoded *out)
{
	struct registers *r = &dev->reg;
	u64 words[16] = {
		r->ring_base, r->tail_addr, r->done_addr, r->ack[0], r->ack[1], r->blocks[0], r->blocks[1], r->head,
		r->tail, r->raises[0], r->raises[1], r->reinits, dev->set[INTEGRITY],
	};
	unsigned int n;

	out->flags = cpu_to_le32(r->enabled | r->ring_error << 1 | r->doorbell << 2 | r->outstanding[0] << 3 |
				 r->outstanding[1] << 4 | r->unsent[0] << 5 | r->unsent[1] << 6);
	out->ring_size = cpu_to_le32(r->ring_size);
	for (n = 0; n < 16; n++)
		out->words[n] = cpu_to_le64(words[n]);
}

static void put_record(struct session *s, enum record_kind kind, u64 at, const void *payload, u32 len)
{
	struct record *head = (struct record *)s->piece;

	memcpy(head + 1, payload, len);
	head->kind = cpu_to_le32(kind);
	head->len = cpu_to_le32(len);
	head->at = cpu_to_le64(at);
	head->payload_crc = cpu_to_le32(crc32_le(~0, payload, len));
	head->crc = cpu_to_le32(crc32_le(~0, (u8 *)head, offsetof(struct record, crc)));
	s->len = sizeof(*head) + len;
}

static bool make(struct migdev *dev, struct session *s)
{
	u64 pages = bulk_pages(dev), page;

	s->at = s->len = 0;
	s->piece_initial = true;
	if (!s->header_done) {
		struct stream_header *h = (struct stream_header *)s->piece;

		memset(h, 0, sizeof(*h));
		h->magic = cpu_to_le64(STREAM_MAGIC);
		h->version = cpu_to_le32(dev->set[VERSION]);
		h->state_size = cpu_to_le64(dev->set[STATE_SIZE]);
		h->crc = cpu_to_le32(crc32_le(~0, (u8 *)h, offsetof(struct stream_header, crc)));
		s->header_done = true;
		s->len = sizeof(*h);
		return true;
	}
	if (s->cursor < pages) {
		put_record(s, RECORD_BULK, s->cursor, dev->bulk + s->cursor * BULK_PAGE, BULK_PAGE);
		s->cursor++;
		return true;
	}
	s->piece_initial = false;
	page = find_first_bit(s->pages, pages);
	if (page < pages) {
		__clear_bit(page, s->pages);
		put_record(s, RECORD_BULK, page, dev->bulk + page * BULK_PAGE, BULK_PAGE);
		return true;
	}
	if (!s->stopped)
		return false;
	while (s->mailbox_cursor < BAR2_SIZE / BULK_PAGE) {
		page = s->mailbox_cursor++;
		if (!mailbox_used(dev, page))
			continue;
		put_record(s, RECORD_MAILBOX, page * BULK_PAGE, dev->mailbox + page * BULK_PAGE, BULK_PAGE);
		return true;
	}
	if (!s->registers_done) {
		struct encoded registers;

		registers_encode(dev, &registers);
		put_record(s, RECORD_REGISTERS, 0, &registers, sizeof(registers));
		s->registers_done = true;
		return true;
	}
	if (!s->trailer_done) {
		struct trailer t = { cpu_to_le64(s->made), cpu_to_le64(dev->generations) };

		put_record(s, RECORD_TRAILER, 0, &t, sizeof(t));
		s->trailer_done = true;
		return true;
	}
	return false;
}

/* Bytes left if the device stopped now; of a whole stream without a session. */
u64 saving_left(struct migdev *dev, struct session *s)
{
	u64 pages = bulk_pages(dev), left = 0, records = 0, page;

	if (!s || !s->header_done)
		left += sizeof(struct stream_header);
	records = s ? pages - s->cursor + bitmap_weight(s->pages, pages) : pages;
	for (page = s ? s->mailbox_cursor : 0; page < BAR2_SIZE / BULK_PAGE; page++)
		records += mailbox_used(dev, page);
	left += records * RECORD_PAGE;
	if (s)
		left += s->len - s->at;
	if (!s || !s->registers_done)
		left += sizeof(struct record) + sizeof(struct encoded);
	if (!s || !s->trailer_done)
		left += sizeof(struct record) + sizeof(struct trailer);
	return left;
}

static ssize_t saving_read(struct file *file, char __user *buf, size_t count, loff_t *pos)
{
	struct session *s = file->private_data;
	struct migdev *dev = s->dev;
	ssize_t ret = 0;

	if (pos)
		return -ESPIPE;
	mutex_lock(&dev->mig);
	if (s->dead || enodev_due(s, &count)) {
		ret = -ENODEV;
		goto out;
	}
	if (dev->set[SHORT_READ])
		count = min_t(u64, count, dev->set[SHORT_READ]);
	while (count) {
		size_t len;

		if (s->at == s->len) {
			bool made;

			mutex_lock(&dev->lock);
			made = make(dev, s);
			mutex_unlock(&dev->lock);
			if (!made)
				break;
			s->made += s->len;
		}
		len = min_t(size_t, count, s->len - s->at);
		if (copy_to_user(buf, s->piece + s->at, len)) {
			if (!ret)
				ret = -EFAULT;
			goto out;
		}
		s->at += len;
		s->moved += len;
		buf += len;
		count -= len;
		ret += len;
	}
	if (!ret && count && !s->stopped && !dev->set[PRECOPY_ZERO])
		ret = -ENOMSG;
out:
	mutex_unlock(&dev->mig);
	return ret;
}

static long saving_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct session *s = file->private_data;
	struct migdev *dev = s->dev;
	struct vfio_precopy_info info;
	size_t size = offsetofend(struct vfio_precopy_info, dirty_bytes);
	long ret = 0;

	if (cmd != VFIO_MIG_GET_PRECOPY_INFO)
		return -ENOTTY;
	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size)
		return -EINVAL;
	mutex_lock(&dev->mig);
	if (s->dead) {
		ret = -ENODEV;
	} else if (s->stopped) {
		ret = -EINVAL;
	} else {
		u64 staged = s->len - s->at;

		mutex_lock(&dev->lock);
		info.initial_bytes = (s->header_done ? 0 : sizeof(struct stream_header)) +
				     (s->piece_initial ? staged : 0) +
				     (bulk_pages(dev) - s->cursor) * RECORD_PAGE;
		info.dirty_bytes = (s->piece_initial ? 0 : staged) +
				   (u64)bitmap_weight(s->pages, bulk_pages(dev)) * RECORD_PAGE;
		mutex_unlock(&dev->lock);
	}
	mutex_unlock(&dev->mig);
	if (!ret && copy_to_user((void __user *)arg, &info, size))
		ret = -EFAULT;
	return ret;
}

static int saving_release(struct inode *inode, struct file *file)
{
	session_put(file->private_data);
	return 0;
}

const struct file_operations saving_fops = {
	.owner = THIS_MODULE,
	.read = saving_read,
	.unlocked_ioctl = saving_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = saving_release,
};
