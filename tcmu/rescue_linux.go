package tcmu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// A removal waits for an answer as an enable does, and its server may have died meanwhile. The device has left configfs by
// then, where its number for an answer would be read, and the folder it was in is locked: whoever looks a name up there
// waits too. Only the kernel's reset of all answers ends that. What else waits for an answer fails with it, so everything that
// can be answered is answered before.

// patience is how long a look into configfs may take before something there is taken for stuck. A removal that is under
// way takes no longer than closing an image.
const patience = 3 * time.Second

// start serves the devices that are there, and frees those who wait for the answer of a server that died.
func (m *Manager) start(ctx context.Context) {
	devices, err := Devices()
	if err != nil {
		m.log.Error("looking for devices", "error", err)
		return
	}
	reachable, stuck := probe(devices, Device.reachable, patience)
	var adopted sync.WaitGroup
	for _, d := range reachable {
		adopted.Go(func() { m.adopt(ctx, d) })
	}
	adopted.Wait()
	if len(stuck) == 0 {
		return
	}
	for _, d := range stuck {
		m.log.Warn("somebody waits for a server that died to let a device go", "device", d.Name)
	}
	if err := resetNetlink(); err != nil {
		m.log.Error("ending the wait", "error", err)
		return
	}
	m.rescan(ctx).Wait()
}

// reachable looks into the device's configuration. It does not return while a removal has the folder.
func (d Device) reachable() { _, _ = os.Stat(d.path("enable")) }

// probe looks at all devices at once, and tells those apart that keep it waiting for longer than the patience.
func probe(devices []Device, look func(Device), patience time.Duration) (reachable, stuck []Device) {
	answered := make([]chan struct{}, len(devices))
	for i, d := range devices {
		answered[i] = make(chan struct{})
		go func() {
			look(d) // may outlive the probe, until the folder is unlocked
			close(answered[i])
		}()
	}
	late, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for i, d := range devices {
		select {
		case <-answered[i]:
			reachable = append(reachable, d)
		case <-late.Done():
			select { // both may be true
			case <-answered[i]:
				reachable = append(reachable, d)
			default:
				stuck = append(stuck, d)
			}
		}
	}
	return reachable, stuck
}

const moduleParameters = "/sys/module/target_core_user/parameters"

// resetNetlink has the kernel give up waiting for all answers. It does so only while it is not to ask.
func resetNetlink() error {
	set := func(name, value string) error {
		if err := os.WriteFile(filepath.Join(moduleParameters, name), []byte(value), 0); err != nil {
			return fmt.Errorf("setting %s of the kernel's TCM-User: %w", name, err)
		}
		return nil
	}
	if err := set("block_netlink", "1"); err != nil {
		return err
	}
	return errors.Join(set("reset_netlink", "1"), set("block_netlink", "0"))
}
