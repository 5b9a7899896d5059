// SPDX-License-Identifier: GPL-2.0
/* The module, its parent device and types, and an instance's life. */
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/version.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "migdev.h"

static int migdev_open(struct vfio_device *vdev)
{
	struct migdev *dev = to_migdev(vdev);
	int ret;

	mutex_lock(&dev->mig);
	session_reset(dev);
	ret = engine_start(dev);
	dev->open = !ret;
	mutex_unlock(&dev->mig);
	return ret;
}

static void migdev_close(struct vfio_device *vdev)
{
	struct migdev *dev = to_migdev(vdev);

	engine_stop(dev);
	mutex_lock(&dev->mig);
	session_reset(dev);
	mutex_lock(&dev->lock);
	interrupts_disconnect(dev);
	mutex_unlock(&dev->lock);
	log_end(dev);
	dev->open = false;
	mutex_unlock(&dev->mig);
}

static long device_info(unsigned long arg)
{
	struct vfio_device_info info;
	size_t size = offsetofend(struct vfio_device_info, num_irqs);

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}

static long region_info(unsigned long arg)
{
	struct vfio_region_info info;
	size_t size = offsetofend(struct vfio_region_info, offset);

	if (copy_from_user(&info, (void __user *)arg, size))
		return -EFAULT;
	if (info.argsz < size || info.index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	info.size = region_size(info.index);
	info.offset = (u64)info.index << REGION_SHIFT;
	info.flags = info.size ? VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE : 0;
	info.cap_offset = 0;
	return copy_to_user((void __user *)arg, &info, size) ? -EFAULT : 0;
}

static long migdev_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg)
{
	struct migdev *dev = to_migdev(vdev);

	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return device_info(arg);
	case VFIO_DEVICE_GET_REGION_INFO:
		return region_info(arg);
	case VFIO_DEVICE_GET_IRQ_INFO:
		return interrupts_info(dev, arg);
	case VFIO_DEVICE_SET_IRQS:
		return interrupts_set(dev, arg);
	case VFIO_DEVICE_RESET:
		mutex_lock(&dev->mig);
		session_reset(dev);
		mutex_unlock(&dev->mig);
		return 0;
	default:
		return -ENOTTY;
	}
}

static void migdev_release(struct vfio_device *vdev)
{
	struct migdev *dev = to_migdev(vdev);

	bulk_free(dev);
	vfree(dev->mailbox);
	kvfree(dev->scratch);
	xa_destroy(&dev->log);
}

static int migdev_init(struct vfio_device *vdev)
{
	struct migdev *dev = to_migdev(vdev);

	mutex_init(&dev->mig);
	mutex_init(&dev->lock);
	mutex_init(&dev->log_lock);
	init_waitqueue_head(&dev->wake);
	xa_init(&dev->log);
	migdev_settings_init(dev);
	dev->mailbox = vzalloc(BAR2_SIZE);
	dev->scratch = kvmalloc(MAX_BLOCK, GFP_KERNEL);
	if (!dev->mailbox || !dev->scratch) {
		vfree(dev->mailbox);
		kvfree(dev->scratch);
		return -ENOMEM;
	}
	vdev->mig_ops = &migdev_mig_ops;
	vdev->log_ops = &migdev_log_ops;
	vdev->migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY;
	return 0;
}

static const struct vfio_device_ops migdev_ops = {
	.name = "migdev",
	.init = migdev_init,
	.release = migdev_release,
	.open_device = migdev_open,
	.close_device = migdev_close,
	.read = front_read,
	.write = front_write,
	.ioctl = migdev_ioctl,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};

struct migdev_type {
	struct mdev_type type;
	u64 state_size;
};

static struct migdev_type types[] = {
	{ { .sysfs_name = "0", .pretty_name = "no bulk state" }, 0 },
	{ { .sysfs_name = "1M", .pretty_name = "1 MiB of bulk state" }, 1 << 20 },
	{ { .sysfs_name = "64M", .pretty_name = "64 MiB of bulk state" }, 64 << 20 },
};

static struct mdev_type *type_list[] = { &types[0].type, &types[1].type, &types[2].type };

static int migdev_probe(struct mdev_device *mdev)
{
	struct migdev_type *type = container_of(mdev->type, struct migdev_type, type);
	struct migdev *dev;
	int ret;

	dev = vfio_alloc_device(migdev, vdev, &mdev->dev, &migdev_ops);
	if (IS_ERR(dev))
		return PTR_ERR(dev);
	ret = bulk_resize(dev, type->state_size);
	if (ret)
		goto put;
	/* Before registration: the attributes appear with the driver's binding, after this returned. */
	dev_set_drvdata(&mdev->dev, dev);
	ret = vfio_register_emulated_iommu_dev(&dev->vdev);
	if (ret)
		goto put;
	return 0;
put:
	vfio_put_device(&dev->vdev);
	return ret;
}

static void migdev_remove(struct mdev_device *mdev)
{
	struct migdev *dev = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&dev->vdev);
	vfio_put_device(&dev->vdev);
}

static unsigned int migdev_available(struct mdev_type *type)
{
	return 64;
}

static struct mdev_driver migdev_driver = {
	.device_api = VFIO_DEVICE_API_PCI_STRING,
	.max_instances = 64,
	.probe = migdev_probe,
	.remove = migdev_remove,
	.get_available = migdev_available,
	.driver = {
		.name = "migdev",
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
		.dev_groups = migdev_groups,
	},
};

static const struct class migdev_class = { .name = "migdev" };
static struct device *parent_dev;
static struct mdev_parent parent;

static int __init migdev_module_init(void)
{
	int ret = class_register(&migdev_class);

	if (ret)
		return ret;
	ret = mdev_register_driver(&migdev_driver);
	if (ret)
		goto class;
	parent_dev = device_create(&migdev_class, NULL, 0, NULL, "migdev");
	if (IS_ERR(parent_dev)) {
		ret = PTR_ERR(parent_dev);
		goto driver;
	}
	ret = mdev_register_parent(&parent, parent_dev, &migdev_driver, type_list, ARRAY_SIZE(type_list));
	if (ret)
		goto device;
	return 0;
device:
	device_unregister(parent_dev);
driver:
	mdev_unregister_driver(&migdev_driver);
class:
	class_unregister(&migdev_class);
	return ret;
}

static void __exit migdev_module_exit(void)
{
	mdev_unregister_parent(&parent);
	device_unregister(parent_dev);
	mdev_unregister_driver(&migdev_driver);
	class_unregister(&migdev_class);
}

module_init(migdev_module_init);
module_exit(migdev_module_exit);
MODULE_DESCRIPTION("Mediated test device that migrates");
MODULE_LICENSE("GPL");
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS(IOMMUFD);
#else
MODULE_IMPORT_NS("IOMMUFD");
#endif
