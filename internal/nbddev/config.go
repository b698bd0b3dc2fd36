package nbddev

import "fmt"

// defaultBlock is the size of a device's sectors.
const defaultBlock = 512

func (c Config) blockSize() int {
	if c.BlockSize == 0 {
		return defaultBlock
	}
	return c.BlockSize
}

// Check returns why the kernel would not take a configuration, or would take it for something else.
func (c Config) Check() error {
	block := c.blockSize()
	switch {
	case block < 512 || block > 4096 || block&(block-1) != 0:
		return fmt.Errorf("sectors of %d bytes: expecting 512, 1024, 2048 or 4096", block)
	case c.Size < 0:
		return fmt.Errorf("a device of %d bytes cannot be", c.Size)
	case c.Timeout < 0 || c.DeadTimeout < 0:
		return fmt.Errorf("times must not be negative")
	}
	return nil
}

// DeviceName is the name of a device by its index.
func DeviceName(index int) string {
	if index == AnyIndex {
		return "a device"
	}
	return fmt.Sprintf("/dev/nbd%d", index)
}
