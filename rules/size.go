package rules

import (
	"math"
	"strconv"
	"strings"
)

// sizeUnits are those of a byte count, each before the ones that it ends with.
var sizeUnits = []struct {
	suffix string
	factor float64
}{
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}, {"B", 1}, {"", 1},
}

// Bounds of the caps of an outbox and of a destination.
const (
	MinCap = 1 << 20
	MaxCap = 1 << 50
)

// ParseSize reads a byte count as configuration and rule files have it: 10GiB,
// 1.5 MB, 4096.
func ParseSize(s string) (int64, bool) {
	for _, u := range sizeUnits {
		num, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(num), 64)
		if err != nil || !(v >= 0 && v*u.factor < math.MaxInt64) {
			return 0, false
		}
		return int64(v * u.factor), true
	}
	return 0, false
}

// FormatSize writes n as ParseSize reads it, in the largest binary unit that it
// fills.
func FormatSize(n int64) string {
	for i := 3; i >= 0; i-- {
		if u := sizeUnits[i]; n >= int64(u.factor) {
			return strconv.FormatFloat(float64(n)/u.factor, 'f', -1, 64) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}
