package block

// Wrapper is implemented by devices that stand before another one and show the same disk.
type Wrapper interface {
	Device
	// Unwrap returns the device behind.
	Unwrap() Device
}

// As returns dev, or the first device behind it, that is a T.
func As[T any](dev Device) (T, bool) {
	for dev != nil {
		if t, ok := dev.(T); ok {
			return t, true
		}
		w, ok := dev.(Wrapper)
		if !ok {
			break
		}
		dev = w.Unwrap()
	}
	var none T
	return none, false
}

// wrap gives a device the manner that its options ask for.
func (l *layer) wrap(dev Device, m manner) Device {
	if dev.Info().ReadOnly {
		return dev
	}
	mode := Mode{NoDiscard: m.discard == "ignore" || m.discard == "" && l.o.IgnoreDiscard && l == l.top}
	switch m.detectZeroes {
	case "on":
		mode.DetectZeroes = DetectOn
	case "unmap":
		mode.DetectZeroes = DetectUnmap
	}
	return WithMode(dev, mode)
}
