package tcmu

import (
	"testing"
	"time"
)

// TestProbe: a device that keeps whoever looks at it waiting is told apart from the others, and keeps none of them.
func TestProbe(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	look := func(d Device) {
		if d.Minor%2 == 1 {
			<-release
		}
	}
	var devices []Device
	for i := range 6 {
		devices = append(devices, Device{Minor: i})
	}
	// The patience is long for those that answer at once: the first stuck one spends it.
	reachable, stuck := probe(devices, look, 300*time.Millisecond)
	if len(reachable) != 3 || len(stuck) != 3 {
		t.Fatalf("reachable %v, stuck %v", reachable, stuck)
	}
	for _, d := range stuck {
		if d.Minor%2 != 1 {
			t.Errorf("device %d is said to be stuck", d.Minor)
		}
	}
	if r, s := probe(nil, look, time.Hour); r != nil || s != nil {
		t.Errorf("no devices: %v, %v", r, s)
	}
}
