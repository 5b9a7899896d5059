// SPDX-License-Identifier: GPL-2.0
/* An instance's settings and faults: numbers in sysfs, each described in README.md. */
#include <linux/device.h>
#include <linux/sysfs.h>

#include "migdev.h"

struct setting_attribute {
	struct device_attribute attr;
	enum setting which;
	u64 max, initial;
};

static ssize_t setting_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct migdev *dev = dev_get_drvdata(device);
	struct setting_attribute *a = container_of(attr, struct setting_attribute, attr);

	return sysfs_emit(buf, "%llu\n", READ_ONCE(dev->set[a->which]));
}

static ssize_t setting_store(struct device *device, struct device_attribute *attr, const char *buf, size_t count)
{
	struct migdev *dev = dev_get_drvdata(device);
	struct setting_attribute *a = container_of(attr, struct setting_attribute, attr);
	u64 value;
	int ret = kstrtou64(buf, 0, &value);

	if (ret)
		return ret;
	if (value > a->max)
		return -ERANGE;
	mutex_lock(&dev->mig);
	switch (a->which) {
	case STATE_SIZE:
		ret = dev->open ? -EBUSY : bulk_resize(dev, value);
		break;
	case MIG_FLAGS:
		/* STOP_COPY is the one that every migratable device has. */
		if (dev->open)
			ret = -EBUSY;
		else if (!(value & VFIO_MIGRATION_STOP_COPY))
			ret = -EINVAL;
		else
			dev->vdev.migration_flags = dev->set[MIG_FLAGS] = value;
		break;
	case DMA_LOG:
		/* Without the operations the core says that there is no such feature. */
		if (dev->open) {
			ret = -EBUSY;
			break;
		}
		dev->set[DMA_LOG] = value;
		dev->vdev.log_ops = value ? &migdev_log_ops : NULL;
		break;
	default:
		WRITE_ONCE(dev->set[a->which], value);
		if (a->which == ENODEV_AFTER)
			dev->struck = false;
	}
	mutex_unlock(&dev->mig);
	engine_kick(dev);
	return ret ? ret : count;
}

#define SETTING(_name, _which, _max, _initial) \
	static struct setting_attribute attr_##_name = { \
		__ATTR(_name, 0644, setting_show, setting_store), _which, _max, _initial }

SETTING(state_size, STATE_SIZE, MAX_STATE, 0);
SETTING(dirty_rate, DIRTY_RATE, 1000000, 1000);
SETTING(dma_interval_us, DMA_INTERVAL_US, 1000000, 100);
SETTING(version, VERSION, 0xffff, 1);
SETTING(mig_flags, MIG_FLAGS, 7, 7);
SETTING(dma_log, DMA_LOG, 1, 1);
SETTING(fail_arc, FAIL_ARC, U64_MAX, 0);
SETTING(fail_errno, FAIL_ERRNO, 511, 5);
SETTING(error_arc, ERROR_ARC, U64_MAX, 0);
SETTING(arc_delay_ms, ARC_DELAY_MS, 60000, 0);
SETTING(short_read, SHORT_READ, U64_MAX, 0);
SETTING(enodev_after, ENODEV_AFTER, U64_MAX, 0);
SETTING(size_percent, SIZE_PERCENT, 100000, 100);
SETTING(precopy_zero, PRECOPY_ZERO, 1, 0);
SETTING(accept_truncated, ACCEPT_TRUNCATED, 1, 0);
SETTING(log_omit_every, LOG_OMIT_EVERY, U64_MAX, 0);
SETTING(irqs_possible, IRQS_POSSIBLE, VECTORS, 0);
SETTING(arcs, ARCS, U64_MAX, 0);
static struct setting_attribute attr_integrity = { __ATTR(integrity, 0444, setting_show, NULL), INTEGRITY, 0, 0 };

static struct setting_attribute *const settings[] = {
	&attr_state_size, &attr_dirty_rate, &attr_dma_interval_us, &attr_version, &attr_mig_flags, &attr_dma_log,
	&attr_fail_arc, &attr_fail_errno, &attr_error_arc, &attr_arc_delay_ms, &attr_short_read, &attr_enodev_after,
	&attr_size_percent, &attr_precopy_zero, &attr_accept_truncated, &attr_log_omit_every, &attr_irqs_possible,
	&attr_arcs, &attr_integrity,
};

void migdev_settings_init(struct migdev *dev)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(settings); i++)
		dev->set[settings[i]->which] = settings[i]->initial;
}

static struct attribute *attributes[] = {
	&attr_state_size.attr.attr, &attr_dirty_rate.attr.attr, &attr_dma_interval_us.attr.attr,
	&attr_version.attr.attr, &attr_mig_flags.attr.attr, &attr_dma_log.attr.attr, &attr_fail_arc.attr.attr,
	&attr_fail_errno.attr.attr,
	&attr_error_arc.attr.attr, &attr_arc_delay_ms.attr.attr, &attr_short_read.attr.attr,
	&attr_enodev_after.attr.attr, &attr_size_percent.attr.attr, &attr_precopy_zero.attr.attr,
	&attr_accept_truncated.attr.attr, &attr_log_omit_every.attr.attr,
	&attr_irqs_possible.attr.attr, &attr_arcs.attr.attr, &attr_integrity.attr.attr, NULL,
};

static const struct attribute_group migdev_group = { .attrs = attributes };
const struct attribute_group *migdev_groups[] = { &migdev_group, NULL };
